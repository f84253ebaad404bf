"""Fields (maps of numbers) resized and thresholded to masks by the C library (fields.c), on the CPU.

The library must be available. Every function raises a MasksetError for arguments that C cannot read safely.
"""

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from maskset.errors import MasksetError
from maskset.kernels import library, runs
from maskset.kernels.runs import MIN_MASKS_PER_THREAD, Counts, Taps, check_taps


def paste(fields: Float32[Tensor, "n S S"], boxes: Float[Tensor, "n 4"], size: tuple[int, int], threshold: float) -> list[Counts]:
    """Return where fields, stretched over boxes in an image of `size` (height, width), reach a threshold."""
    height, width = library.check_height_width(size)
    side = fields.shape[-1] if isinstance(fields, Tensor) and fields.ndim else 0
    if not 0 < side < 2**15:
        raise MasksetError(
            f"fields must be squares [n S S] of at least one cell and fewer than 2^15 a side, got a side of {side}."
        )
    fields = library.check("fields", fields, (None, side, side), torch.float32)
    boxes = library.check("boxes", boxes, (len(fields), 4)).double()
    fields_paste, bound = library.function("fields_paste"), _just_below(threshold)

    def write(out: Tensor, starts: Tensor, needed: Tensor, first: int, end: int) -> None:
        scratch = torch.empty(7 * height + 4 * width, dtype=torch.float32)
        fields_paste(fields, boxes, side, bound, height, width, out, starts, needed, scratch, first, end)

    covered = (boxes[:, 2] - boxes[:, 0]).nan_to_num(0).clamp(0, width)
    return runs.collect(write, runs.estimated_counts(covered.long()))


def parts(
    begins: Int64[Tensor, "n"], row_stride: Int64[Tensor, "n"], rows: Int64[Tensor, "n 4"], columns: Int64[Tensor, "n 4"]
) -> Int64[Tensor, "n 8"]:
    """Return the description of parts of fields that `resize` and `cut` read.

    Args:
        begins: where the cells of each part begin.
        row_stride: distance between its rows.
        rows: first source row and its end, first target row and its end.
        columns: the same for columns.
    """
    return torch.stack([begins, row_stride, rows[:, 0], columns[:, 0], *rows[:, 2:].unbind(1), *columns[:, 2:].unbind(1)], 1)


def resize(
    cells: Float32[Tensor, "_"], parts: Int64[Tensor, "n 8"], rows: Taps, columns: Taps
) -> tuple[Float32[Tensor, "_"], Int64[Tensor, "n"]]:
    """Return parts of resized fields, concatenated, and where each begins.

    Args:
        cells: the numbers of all fields.
        parts: see the function of that name.
        rows: the taps of each row of the whole result.
        columns: the taps of each column.
    """
    rows, columns = check_taps("rows", rows), check_taps("columns", columns)
    cells, parts = _check_parts(cells, parts, rows, columns)
    starts = runs.starts_of((parts[:, 5] - parts[:, 4]) * (parts[:, 7] - parts[:, 6]))
    out, widest = torch.empty(int(starts[-1]), dtype=torch.float32), int(columns[1][-1:].sum()) + 1
    fields_resize = library.function("fields_resize")

    def write(first: int, end: int) -> None:
        scratch = torch.empty(widest, dtype=torch.float32)
        fields_resize(cells, parts, *rows, *columns, out, starts, scratch, first, end)

    library.parallel_for(write, len(parts), MIN_MASKS_PER_THREAD)
    return out, starts[:-1]


def cut(cells: Float32[Tensor, "_"], parts: Int64[Tensor, "n 8"], rows: Taps, columns: Taps, threshold: float) -> list[Counts]:
    """Return the run lengths of where fields, resized to the size of the image as by `resize`, exceed a threshold."""
    rows, columns = check_taps("rows", rows), check_taps("columns", columns)
    cells, parts = _check_parts(cells, parts, rows, columns)
    height, width = library.check_height_width((len(rows[0]), len(columns[0])))
    fields_cut, bound = library.function("fields_cut"), torch.tensor([threshold], dtype=torch.float32)

    def write(out: Tensor, starts: Tensor, needed: Tensor, first: int, end: int) -> None:
        scratch = torch.empty(5 * height, dtype=torch.float32)
        fields_cut(cells, parts, *rows, *columns, bound, height, width, out, starts, needed, scratch, first, end)

    return runs.collect(write, runs.estimated_counts(parts[:, 7] - parts[:, 6]))


def _check_parts(cells: Tensor, parts: Tensor, rows: Taps, columns: Taps) -> tuple[Tensor, Tensor]:
    """Return both without gaps.

    Raises:
        MasksetError: a part would read outside of the cells, or its target does not lie inside the result.
    """
    cells = library.check("cells", cells, (None,), torch.float32)
    parts = library.check("parts", parts, (None, 8), torch.int64)
    *_, top, bottom, left, right = parts.unbind(1)
    inside = (top >= 0) & (bottom <= len(rows[0])) & (left >= 0) & (right <= len(columns[0]))
    drawn = (bottom > top) & (right > left)  # the others read nothing
    if not bool((inside & (bottom >= top) & (right >= left)).all()):
        raise MasksetError("parts must lie inside the result and end where they begin, or later.")
    begins, row_stride, row, column, top, bottom, left, right = parts[drawn].unbind(1)
    above, below = rows[0][top] - row, rows[1][bottom - 1] - row  # the source rows and columns, from the first of the part
    before, behind = columns[0][left] - column, columns[1][right - 1] - column
    last = begins + below * row_stride + behind
    not_negative = torch.stack([begins, row_stride, row, column, above, before]).amin(0) >= 0
    no_overflow = torch.stack([begins, row_stride, below]).amax(0) <= len(cells)
    if not bool((not_negative & no_overflow & (last < min(len(cells), 2**31))).all()):
        raise MasksetError(f"parts read cells outside of the {len(cells)} that there are.")
    return cells, parts


def _just_below(threshold: float) -> Float32[Tensor, "1"]:
    """Return the largest number below a threshold: what exceeds it reaches the threshold."""
    return torch.tensor([threshold], dtype=torch.float32).nextafter(torch.tensor([-torch.inf], dtype=torch.float32))
