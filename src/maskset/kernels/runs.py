"""Run lengths in C (runs.c, polygons.c), and training targets from them (targets.c). `maskset.rle` describes run lengths.

The plain versions are in `maskset.rle` and `maskset.masks.targets`. All tensors are on the CPU, and the library must be available
(`library.handle`). Every function raises a MasksetError for arguments that C cannot read safely.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int, Int32, Int64
from torch import Tensor

from maskset.errors import MasksetError
from maskset.kernels import library

Counts = Int32[Tensor, "_"]
# For each cell of a result along one axis: the indices of two source cells, low and high, neither decreasing, and their weights.
Taps = tuple[Int[Tensor, "_"], Int[Tensor, "_"], Tensor, Tensor]
_INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8, torch.bool)
_BLOCK = 64  # columns, as in runs.c
MIN_MASKS_PER_THREAD = 16
_MIN_TARGETS_PER_THREAD = 4


@dataclass(frozen=True)
class View:
    """A selection of whole rows and columns of masks, as flips, crops and nearest-neighbor scaling make.

    Attributes:
        counts: run lengths of all masks, concatenated.
        starts: where the run lengths of each mask begin, followed by the total number.
        height: of the masks, pixels.
        rows: for each row of the view, which row of the masks it is, never decreasing; `height`: background.
        columns: for each column of the view, which column of the masks it is, in any order; -1: background.
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
        for name, indices in (("rows", rows), ("columns", columns)):
            library.check(name, indices, (None,), torch.int64, torch.int32)
            if len(indices) and int(indices.min()) < 0:
                raise MasksetError(f"{name} of a view must be 0 or more, got {int(indices.min())}.")
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
        library.check_height_width((self.height, 1))
        library.check_height_width((len(rows), len(columns)))
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


def concatenate(counts: Sequence[Counts]) -> tuple[Counts, Int64[Tensor, "_"]]:
    """Return the run lengths of all masks concatenated, and where those of each mask begin, followed by the total number.

    Raises:
        MasksetError: run lengths are not one-dimensional integer tensors on the CPU.
    """
    for lengths in counts:
        library.check("run lengths", lengths, (None,), *_INTEGERS)
    return torch.cat([torch.zeros(0, dtype=torch.int32), *counts]).int(), starts_of([len(lengths) for lengths in counts])


def starts_of(lengths: Sequence[int] | Int64[Tensor, "_"]) -> Int64[Tensor, "_"]:
    """Return where consecutive items of these lengths begin, followed by the end of the last one."""
    return F.pad(torch.as_tensor(lengths, dtype=torch.int64).cumsum(0), (1, 0))


def view(counts: Sequence[Counts], size: tuple[int, int], rows: Tensor | None = None, columns: Tensor | None = None) -> View:
    """Return a view of some rows and columns of masks of `size` (height, width); None: all.

    Raises:
        MasksetError: the size or the run lengths are not valid.
    """
    selected = zip(library.check_height_width(size), (rows, columns), strict=True)
    indices = (torch.arange(side) if index is None else index.cpu().long() for side, index in selected)
    return View(*concatenate(counts), size[0], *indices)


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
    library.check_height_width((height, width))
    runs_encode = library.function("runs_encode")

    def write(out: Tensor, starts: Tensor, needed: Tensor, first: int, end: int) -> None:
        scratch = torch.empty(_BLOCK * height, dtype=torch.uint8)
        runs_encode(pixels, height, width, out, starts, needed, scratch, first, end)

    return collect(write, estimated_counts(torch.full((count,), width)))


def encode_view(view: View) -> list[Counts]:
    """Return the run lengths of the masks in the view."""
    runs_view, c_view = library.function("runs_view"), view.to_c()
    return collect(lambda *rest: runs_view(c_view, *rest), estimated_counts(torch.full((len(view),), len(view.columns))))


def dense(view: View) -> Bool[Tensor, "T h w"]:
    """Return the pixels of the view, which are column-major in memory."""
    runs_draw, c_view = library.function("runs_draw"), view.to_c()
    pixels = torch.zeros(len(view), len(view.columns), len(view.rows), dtype=torch.bool)
    library.parallel_for(lambda first, end: runs_draw(c_view, pixels, first, end), len(view), MIN_MASKS_PER_THREAD)
    return pixels.transpose(1, 2)


def boxes_and_areas(counts: Sequence[Counts], height: int) -> Int64[Tensor, "T 5"]:
    """Return the tight box x0 y0 x1 y1 of each mask (x1 and y1 exclusive; zeros for an empty mask) and its area in pixels."""
    library.check_height_width((height, 1))
    measures = torch.zeros(len(counts), 5, dtype=torch.int64)
    library.function("runs_measure")(*concatenate(counts), height, measures, 0, len(counts))
    return measures


def to_strings(counts: Sequence[Counts]) -> list[str]:
    """Return COCO's compressed text of each mask."""
    numbers, starts = concatenate(counts)
    text, lengths = torch.empty(7 * len(numbers), dtype=torch.uint8), torch.zeros(len(counts), dtype=torch.int64)
    library.function("runs_to_text")(numbers, starts, text, lengths, 0, len(counts))
    characters, begins = text.numpy().tobytes().decode("ascii", "replace"), (7 * starts).tolist()
    return [characters[begin : begin + length] for begin, length in zip(begins, lengths.tolist(), strict=False)]


def from_string(text: bytes) -> Counts | int:
    """Return the run lengths of COCO's compressed text, or the negative error code of runs_from_text if it is invalid."""
    if not isinstance(text, bytes):
        raise MasksetError(f"a run-length text must be bytes, got {type(text).__name__}.")
    counts = torch.empty(len(text), dtype=torch.int32)
    number = library.function("runs_from_text")(text, len(text), counts)
    return counts[:number].clone() if number >= 0 else number


def rasterize(
    points: Float64[Tensor, "P 2"], corners: Sequence[int], parts: Sequence[int], size: tuple[int, int]
) -> list[Counts]:
    """Return the run lengths of masks, each the union of polygons rasterized as COCO does.

    Args:
        points: x and y of the corners of all polygons, pixels.
        corners: number of corners of each polygon.
        parts: number of polygons of each mask.
        size: height and width of the image.
    """
    points, size = library.check("points", points, (sum(corners), 2), torch.float64), library.check_height_width(size)
    if min(corners, default=0) < 0 or min(parts, default=0) < 0 or sum(parts) != len(corners):
        raise MasksetError(f"parts must sum to the number of polygons, {len(corners)}, none negative, got {list(parts)[:8]}.")
    begins, ends = starts_of(corners), starts_of(parts)
    crossings = torch.zeros(len(corners), dtype=torch.int64)
    library.function("polygons_crossings")(points, begins, size[1], crossings, 0, len(corners))
    estimates = starts_of(crossings)[ends].diff()
    polygons_draw, max_crossings = library.function("polygons_draw"), int(estimates.max()) if len(estimates) else 0

    def write(out: Tensor, starts: Tensor, needed: Tensor, first: int, end: int) -> None:
        polygons_draw(points, begins, ends, *size, out, starts, needed, torch.empty(max_crossings, dtype=torch.int64), first, end)

    return collect(write, estimates + 1)


def crop(view: View, boxes: Float[Tensor, "T 4"], size: int) -> Bool[Tensor, "T S S"]:
    """Return each mask cropped to its box x0 y0 x1 y1, in pixels of the view, and resampled to S x S pixels."""
    if not isinstance(size, int) or not 0 < size < 2**15:
        raise MasksetError(f"the size of a crop must be an integer from 1 to 2^15 - 1, got {size}.")
    boxes = library.check("boxes", boxes, (len(view), 4), *library.NUMBERS).double()
    crops = torch.zeros(len(view), size, size, dtype=torch.bool)
    targets_crop, c_view = library.function("targets_crop"), view.to_c()

    def write(first: int, end: int) -> None:
        pixels = torch.empty(len(view.rows) * len(view.columns), dtype=torch.uint8)
        int_scratch = torch.empty(len(view.rows) + 3 * size + 1, dtype=torch.int32)
        targets_crop(c_view, boxes, size, crops, pixels, int_scratch, first, end)

    library.parallel_for(write, len(view), _MIN_TARGETS_PER_THREAD)
    return crops


def resize(view: View, rows: Taps, columns: Taps) -> Float[Tensor, "T h w"]:
    """Return bilinear samples, each the weighted mean of four pixels of the view; pixels beyond it are background.

    Args:
        view: of the masks.
        rows: the taps of each row of the result.
        columns: the taps of each column.
    """
    rows, columns = check_taps("rows", rows), check_taps("columns", columns)
    means = torch.zeros(len(view), len(rows[0]), len(columns[0]), dtype=torch.float32)
    _sample("targets_resize", view, rows, columns, means)
    return means


def resize_as_opencv(view: View, rows: Taps, columns: Taps) -> Bool[Tensor, "T h w"]:
    """Return the samples as `cv2.resize` computes them: weights in units of 1 / 2048, rounded to 0 or 1."""
    rows, columns = check_taps("rows", rows, torch.int32), check_taps("columns", columns, torch.int32)
    cells = torch.zeros(len(view), len(rows[0]), len(columns[0]), dtype=torch.bool)
    _sample("targets_resize_opencv", view, rows, columns, cells)
    return cells


def _sample(name: str, view: View, rows: Taps, columns: Taps, out: Tensor) -> None:
    function, weights = library.function(name), (*rows[2:], *columns[2:])
    near, far = (view.at(rows[i], columns[i]).to_c() for i in range(2))

    def write(first: int, end: int) -> None:
        function(near, far, *weights, out, torch.empty(4 * out.shape[1], dtype=torch.uint8), first, end)

    library.parallel_for(write, len(view), _MIN_TARGETS_PER_THREAD)


def check_taps(name: str, taps: Taps, dtype: torch.dtype = torch.float32) -> Taps:
    """Return the taps as C reads them, indices as int32 and weights in a type.

    Raises:
        MasksetError: the four do not have the same length, or an index is negative, beyond 2^31 or decreases.
    """
    if len(taps) != 4 or not all(isinstance(tap, Tensor) and tap.ndim == 1 for tap in taps):
        raise MasksetError(f"{name} must be four one-dimensional tensors: low, high and their two weights.")
    low, high = (library.check(f"{name} index", tap, (len(taps[0]),), torch.int64, torch.int32) for tap in taps[:2])
    near, far = (library.check(f"{name} weight", tap, (len(low),), *library.NUMBERS) for tap in taps[2:])
    for index in (low, high):
        if len(index) and (int(index[0]) < 0 or int(index[-1]) >= 2**31 or bool((index.diff() < 0).any())):
            raise MasksetError(f"{name} indices must be 0 or more, below 2^31, and must not decrease.")
    if bool((low > high).any()):
        raise MasksetError(f"{name} indices: the low one must not exceed the high one.")
    return low.int(), high.int(), near.to(dtype), far.to(dtype)
