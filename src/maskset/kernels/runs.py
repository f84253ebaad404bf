"""Run lengths by the C library (runs.c, polygons.c). The plain twins and a description of run lengths are in `maskset.rle`.

Everything here is on the CPU, and the library must be available, see `maskset.kernels.library.handle`. Every function raises a
MasksetError for arguments that C cannot read safely.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float64, Int, Int32, Int64
from torch import Tensor

from maskset.errors import MasksetError
from maskset.kernels import library

Counts = Int32[Tensor, "_"]
_BLOCK = 64  # columns, as in runs.c
MIN_MASKS_PER_THREAD = 16


@dataclass(frozen=True)
class View:
    """Masks seen through a selection of whole rows and columns of their image, as flips, crops and nearest scaling give.

    Attributes:
        counts: run lengths of all masks, concatenated.
        starts: where the run lengths of each mask begin, followed by the total number.
        height: of the masks, pixels.
        rows: the row of the masks that each row of the view shows, never decreasing; `height`: background.
        columns: the column of the masks that each column of the view shows, in any order; -1: background.
    """

    counts: Counts
    starts: Int64[Tensor, "T_and_one"]
    height: int
    rows: Int64[Tensor, "h"]
    columns: Int64[Tensor, "w"]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def at(self, rows: Int[Tensor, "_"], columns: Int[Tensor, "_"]) -> "View":
        """Return a view of some rows (never decreasing) and columns of this view; positions beyond it are background.

        Raises:
            MasksetError: a position is negative or no integer.
        """
        for name, places in (("rows", rows), ("columns", columns)):
            library.check(name, places, (None,), torch.int64, torch.int32)
            if len(places) and int(places.min()) < 0:
                raise MasksetError(f"{name} of a view must be 0 or more, got {int(places.min())}.")
        padded_rows, padded_columns = F.pad(self.rows, (0, 1), value=self.height), F.pad(self.columns, (0, 1), value=-1)
        rows, columns = padded_rows[rows.clamp(max=len(self.rows))], padded_columns[columns.clamp(max=len(self.columns))]
        return View(self.counts, self.starts, self.height, rows, columns)

    def to_c(self) -> Any:
        """Return the structure that C reads.

        Raises:
            MasksetError: the attributes are not what the class describes.
        """
        counts, starts = check_counts(self.counts, self.starts)
        rows, columns = (library.check(name, getattr(self, name), (None,), torch.int64) for name in ("rows", "columns"))
        library.check_size((self.height, 1))
        library.check_size((len(rows), len(columns)))
        if len(rows) and (int(rows[0]) < 0 or int(rows[-1]) > self.height or bool((rows.diff() < 0).any())):
            raise MasksetError(f"rows of a view must be non-decreasing and within 0..{self.height}.")
        if len(columns) and (int(columns.min()) < -1 or int(columns.max()) >= 2**31):
            raise MasksetError("columns of a view must be -1 (background) or a column of the masks.")
        above = torch.searchsorted(rows, torch.arange(self.height + 1))
        arrays = [counts, starts, above, columns]
        view = _View(*(array.data_ptr() for array in arrays), self.height, len(rows), len(columns))
        view.arrays = arrays
        return ctypes.byref(view)


class _View(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("counts", "starts", "above", "columns")] + [
        (name, ctypes.c_ssize_t) for name in ("height", "rows", "width")
    ]
    arrays: list[Tensor]  # kept alive as long as C may read them


def check_counts(counts: Counts, starts: Int64[Tensor, "_"]) -> tuple[Tensor, Tensor]:
    """Return concatenated run lengths and where those of each mask begin, without gaps.

    Raises:
        MasksetError: the types or shapes are wrong, or a mask would begin outside of the run lengths.
    """
    counts = library.check("run lengths", counts, (None,), torch.int32)
    starts = library.check("starts", starts, (None,), torch.int64)
    if not len(starts) or int(starts[0]) < 0 or int(starts[-1]) > len(counts) or bool((starts.diff() < 0).any()):
        raise MasksetError(
            f"starts of run lengths must be non-decreasing and within 0..{len(counts)}, got {starts.tolist()[:8]}."
        )
    return counts, starts


def flat(counts: Sequence[Counts]) -> tuple[Counts, Int64[Tensor, "_"]]:
    """Return the run lengths of all masks concatenated, and where those of each mask begin, followed by the total number.

    Raises:
        MasksetError: run lengths are not one-dimensional integer tensors on the CPU.
    """
    for lengths in counts:
        if (
            not isinstance(lengths, Tensor)
            or lengths.ndim != 1
            or lengths.is_floating_point()
            or lengths.is_complex()
            or lengths.device.type != "cpu"
        ):
            is_tensor = isinstance(lengths, Tensor)
            got = f"{lengths.dtype} of shape {list(lengths.shape)} on {lengths.device}" if is_tensor else type(lengths).__name__
            raise MasksetError(f"run lengths must be one-dimensional int32 tensors on the CPU, got {got}.")
    return torch.cat([torch.zeros(0, dtype=torch.int32), *counts]).int(), starts_of([len(lengths) for lengths in counts])


def starts_of(lengths: Sequence[int] | Int64[Tensor, "_"]) -> Int64[Tensor, "_"]:
    """Return where consecutive items of these lengths begin, followed by the end of the last one."""
    return F.pad(torch.as_tensor(lengths, dtype=torch.int64).cumsum(0), (1, 0))


def view(counts: Sequence[Counts], size: tuple[int, int], rows: Tensor | None = None, columns: Tensor | None = None) -> View:
    """Return a view of masks of `size` (height, width) that shows some rows and columns; None: all.

    Raises:
        MasksetError: the size or the run lengths are not valid.
    """
    selected = zip(library.check_size(size), (rows, columns), strict=True)
    indices = (torch.arange(side) if index is None else index.cpu().long() for side, index in selected)
    return View(*flat(counts), size[0], *indices)


def collect(write: Callable[[Tensor, Tensor, Tensor, int, int], Any], estimates: Int64[Tensor, "T"]) -> list[Counts]:
    """Return the run lengths that a function of the library writes.

    Args:
        write: receives the output, where the output of each mask begins, how many counts each needs (to be set), and a range of
            masks.
        estimates: how many counts each mask probably needs; where an estimate is too small, everything is written again.
    """
    while True:
        starts, needed = starts_of(estimates), torch.zeros_like(estimates)
        out = torch.empty(int(starts[-1]), dtype=torch.int32)

        def work(first: int, end: int, out: Tensor = out, starts: Tensor = starts, needed: Tensor = needed) -> None:
            write(out, starts, needed, first, end)

        library.parallel_for(work, len(estimates), MIN_MASKS_PER_THREAD)
        if bool((needed <= estimates).all()):
            break
        estimates = needed
    ends, numbers = (starts[:-1] + needed).tolist(), out.numpy()  # copied: keeping or pickling one mask must not keep all
    return [torch.from_numpy(numbers[start:end].copy()) for start, end in zip(starts.tolist(), ends, strict=False)]


def estimated_counts(columns: Int64[Tensor, "T"]) -> Int64[Tensor, "T"]:
    """Return how many counts masks of this many columns probably need: most columns of an object have one or two runs."""
    return 6 * columns + 8


def encode(masks: Bool[Tensor, "T h w"]) -> list[Counts]:
    """Return the run lengths of each mask."""
    pixels = library.check("masks", masks, (None, None, None), torch.bool)
    count, height, width = pixels.shape
    library.check_size((height, width))
    runs_encode = library.function("runs_encode")

    def write(out: Tensor, starts: Tensor, needed: Tensor, first: int, end: int) -> None:
        scratch = torch.empty(_BLOCK * height, dtype=torch.uint8)
        runs_encode(pixels, height, width, out, starts, needed, scratch, first, end)

    return collect(write, estimated_counts(torch.full((count,), width)))


def viewed(view: View) -> list[Counts]:
    """Return the run lengths of the masks as the view shows them."""
    runs_view, c_view = library.function("runs_view"), view.to_c()
    return collect(lambda *rest: runs_view(c_view, *rest), estimated_counts(torch.full((len(view),), len(view.columns))))


def dense(view: View) -> Bool[Tensor, "T h w"]:
    """Return the pixels that the view shows, in memory column by column."""
    runs_draw, c_view = library.function("runs_draw"), view.to_c()
    pixels = torch.zeros(len(view), len(view.columns), len(view.rows), dtype=torch.bool)
    library.parallel_for(lambda first, end: runs_draw(c_view, pixels, first, end), len(view), MIN_MASKS_PER_THREAD)
    return pixels.transpose(1, 2)


def measure(counts: Sequence[Counts], height: int) -> Int64[Tensor, "T 5"]:
    """Return the tight box x0 y0 x1 y1 of each mask (x1 and y1 exclusive; zeros for an empty mask) and its area in pixels."""
    library.check_size((height, 1))
    measures = torch.zeros(len(counts), 5, dtype=torch.int64)
    library.function("runs_measure")(*flat(counts), height, measures, 0, len(counts))
    return measures


def to_strings(counts: Sequence[Counts]) -> list[str]:
    """Return COCO's compressed text of each mask."""
    numbers, starts = flat(counts)
    text, lengths = torch.empty(7 * len(numbers), dtype=torch.uint8), torch.zeros(len(counts), dtype=torch.int64)
    library.function("runs_to_text")(numbers, starts, text, lengths, 0, len(counts))
    whole, begins = text.numpy().tobytes().decode("ascii", "replace"), (7 * starts).tolist()
    return [whole[begin : begin + length] for begin, length in zip(begins, lengths.tolist(), strict=False)]


def from_string(text: bytes) -> Counts | int:
    """Return the run lengths of COCO's compressed text, or the negative error code of runs_from_text if it is invalid."""
    if not isinstance(text, bytes):
        raise MasksetError(f"a run-length text must be bytes, got {type(text).__name__}.")
    counts = torch.empty(len(text), dtype=torch.int32)
    number = library.function("runs_from_text")(text, len(text), counts)
    return counts[:number].clone() if number >= 0 else number


def rasterized(
    points: Float64[Tensor, "P 2"], corners: Sequence[int], parts: Sequence[int], size: tuple[int, int]
) -> list[Counts]:
    """Return the run lengths of masks, each the union of polygons rasterized as COCO does.

    Args:
        points: x and y of the corners of all polygons, pixels.
        corners: number of corners of each polygon.
        parts: number of polygons of each mask.
        size: height and width of the image.
    """
    points, size = library.check("points", points, (sum(corners), 2), torch.float64), library.check_size(size)
    if min(corners, default=0) < 0 or min(parts, default=0) < 0 or sum(parts) != len(corners):
        raise MasksetError(f"parts must sum to the number of polygons, {len(corners)}, none negative, got {list(parts)[:8]}.")
    begins, ends = starts_of(corners), starts_of(parts)
    crossings = torch.zeros(len(corners), dtype=torch.int64)
    library.function("polygons_crossings")(points, begins, size[1], crossings, 0, len(corners))
    estimates = starts_of(crossings)[ends].diff()
    polygons_draw, most = library.function("polygons_draw"), int(estimates.max()) if len(estimates) else 0

    def write(out: Tensor, starts: Tensor, needed: Tensor, first: int, end: int) -> None:
        polygons_draw(points, begins, ends, *size, out, starts, needed, torch.empty(most, dtype=torch.int64), first, end)

    return collect(write, estimates + 1)
