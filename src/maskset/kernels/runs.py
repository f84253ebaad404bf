"""Run lengths by the C library (runs.c, polygons.c); maskset.rle says what they are, and has the plain twins.

Everything here is on the CPU, and the library must be there, see `maskset.kernels.library.library`.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float64, Int32, Int64
from torch import Tensor

from maskset.kernels import library

Counts = Int32[Tensor, "_"]
_BLOCK = 64  # columns, as in runs.c
_LEAST = 16  # masks that are worth a thread's attention


@dataclass(frozen=True)
class View:
    """Masks as somebody sees them who moved whole rows and columns of their image.

    Attributes:
        counts: run lengths of all masks, one after the other.
        starts: where those of each mask begin, and at last where they end.
        height: of the masks, pixels.
        rows: which row of the masks each row of the view shows, from top to bottom; `height`: nothing.
        columns: which column each column shows, in any order; -1: nothing.
    """

    counts: Counts
    starts: Int64[Tensor, "T_and_one"]
    height: int
    rows: Int64[Tensor, "h"]
    columns: Int64[Tensor, "w"]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def at(self, rows: Int64[Tensor, "_"], columns: Int64[Tensor, "_"]) -> "View":
        """Return a view of some rows (which never go back) and columns of this one; beyond it there is nothing."""
        shown_rows, shown_columns = F.pad(self.rows, (0, 1), value=self.height), F.pad(self.columns, (0, 1), value=-1)
        rows, columns = shown_rows[rows.clamp(max=len(self.rows))], shown_columns[columns.clamp(max=len(self.columns))]
        return View(self.counts, self.starts, self.height, rows, columns)

    def passed(self) -> Any:
        """Return what C reads."""
        above = torch.searchsorted(self.rows, torch.arange(self.height + 1))
        arrays = [self.counts, self.starts, above, self.columns.contiguous()]
        view = _View(*(array.data_ptr() for array in arrays), self.height, len(self.rows), len(self.columns))
        view.kept = arrays
        return ctypes.byref(view)


class _View(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("counts", "starts", "above", "columns")] + [
        (name, ctypes.c_ssize_t) for name in ("height", "rows", "width")
    ]
    kept: list[Tensor]  # alive as long as C may read them


def flat(counts: Sequence[Counts]) -> tuple[Counts, Int64[Tensor, "_"]]:
    """Return run lengths one after the other, and where those of each mask begin, and at last where they end."""
    return torch.cat([torch.zeros(0, dtype=torch.int32), *counts]).int(), starts_of([len(one) for one in counts])


def starts_of(lengths: Sequence[int] | Int64[Tensor, "_"]) -> Int64[Tensor, "_"]:
    """Return where things of these lengths begin that lie one after the other, and at last where they end."""
    return F.pad(torch.as_tensor(lengths, dtype=torch.int64).cumsum(0), (1, 0))


def view(counts: Sequence[Counts], size: tuple[int, int], rows: Tensor | None = None, columns: Tensor | None = None) -> View:
    """Return the view of masks of `size` (height, width) that shows these rows and columns; None: all."""
    shown = (torch.arange(side) if which is None else which for side, which in zip(size, (rows, columns), strict=True))
    return View(*flat(counts), size[0], *(which.cpu().long() for which in shown))


def written(write: Callable[[Tensor, Tensor, Tensor, int, int], Any], rooms: Int64[Tensor, "T"]) -> list[Counts]:
    """Return the run lengths that a function of the library writes.

    Args:
        write: takes all counts, where those of each mask begin, how many each needs (which it sets), and a range of masks.
        rooms: how many counts each mask probably needs; where it is more, they are written again.
    """
    while True:
        starts, needed = starts_of(rooms), torch.zeros_like(rooms)
        out = torch.empty(int(starts[-1]), dtype=torch.int32)
        library.parallel_for(lambda first, end: write(out, starts, needed, first, end), len(rooms), _LEAST)  # noqa: B023
        if bool((needed <= rooms).all()):
            break
        rooms = needed
    ends, numbers = (starts[:-1] + needed).tolist(), out.numpy()  # copies: who keeps one mask does not keep, or pickle, all
    return [torch.from_numpy(numbers[start:end].copy()) for start, end in zip(starts.tolist(), ends, strict=False)]


def probable(columns: Int64[Tensor, "T"]) -> Int64[Tensor, "T"]:
    """Return how many counts masks of so many columns probably need: objects have few parts, one above the other."""
    return 6 * columns + 8


def encode(masks: Bool[Tensor, "T h w"]) -> list[Counts]:
    """Return the run lengths of each mask."""
    count, height, width = masks.shape
    work, pixels = library.function("runs_encode"), masks.bool().contiguous()

    def write(out: Tensor, starts: Tensor, needed: Tensor, first: int, end: int) -> None:
        scratch = torch.empty(_BLOCK * height, dtype=torch.uint8)
        work(pixels, height, width, out, starts, needed, scratch, first, end)

    return written(write, probable(torch.full((count,), width)))


def viewed(view: View) -> list[Counts]:
    """Return the run lengths of what the view shows."""
    work, passed = library.function("runs_view"), view.passed()
    return written(lambda *rest: work(passed, *rest), probable(torch.full((len(view),), len(view.columns))))


def dense(view: View) -> Bool[Tensor, "T h w"]:
    """Return the pixels that the view shows; they lie column by column."""
    pixels = torch.zeros(len(view), len(view.columns), len(view.rows), dtype=torch.bool)
    work, passed = library.function("runs_draw"), view.passed()
    library.parallel_for(lambda first, end: work(passed, pixels, first, end), len(view), _LEAST)
    return pixels.transpose(1, 2)


def measure(counts: Sequence[Counts], height: int) -> Int64[Tensor, "T 5"]:
    """Return the tight box x0 y0 x1 y1 of each mask (ends exclusive; zeros if no pixel is set) and how many pixels are set."""
    found = torch.zeros(len(counts), 5, dtype=torch.int64)
    library.function("runs_measure")(*flat(counts), height, found, 0, len(counts))
    return found


def to_strings(counts: Sequence[Counts]) -> list[str]:
    """Return COCO's compressed text of each mask."""
    numbers, starts = flat(counts)
    text, lengths = torch.empty(7 * len(numbers), dtype=torch.uint8), torch.zeros(len(counts), dtype=torch.int64)
    library.function("runs_to_text")(numbers, starts, text, lengths, 0, len(counts))
    whole, begins = text.numpy().tobytes().decode("ascii", "replace"), (7 * starts).tolist()
    return [whole[begin : begin + length] for begin, length in zip(begins, lengths.tolist(), strict=False)]


def from_string(text: bytes) -> Counts | int:
    """Return the run lengths that a text stands for; what runs_from_text returns instead if it is none."""
    counts = torch.empty(len(text), dtype=torch.int32)
    found = library.function("runs_from_text")(text, len(text), counts)
    return counts[:found].clone() if found >= 0 else found


def rasterised(
    points: Float64[Tensor, "P 2"], corners: Sequence[int], parts: Sequence[int], size: tuple[int, int]
) -> list[Counts]:
    """Return the run lengths of masks of `size` (height, width), each the union of polygons, drawn as COCO does.

    Args:
        points: x and y of the corners of all polygons, pixels.
        corners: how many each polygon has.
        parts: how many polygons each mask has.
        size: of the image.
    """
    begins, ends = starts_of(corners), starts_of(parts)
    crossings = torch.zeros(len(corners), dtype=torch.int64)
    library.function("polygons_crossings")(points, begins, size[1], crossings, 0, len(corners))
    rooms = starts_of(crossings)[ends].diff()
    work, most = library.function("polygons_draw"), int(rooms.max()) if len(rooms) else 0

    def write(out: Tensor, starts: Tensor, needed: Tensor, first: int, end: int) -> None:
        work(points, begins, ends, *size, out, starts, needed, torch.empty(most, dtype=torch.int64), first, end)

    return written(write, rooms + 1)
