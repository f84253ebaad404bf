"""Fields of numbers resized and cut to masks by the C library (fields.c), on the CPU, which must have it."""

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from maskset.kernels import library, runs
from maskset.kernels.runs import Counts

# What each cell of a result sees along an axis: two cells, low and high, which never go back, and how much of each, near and far.
Taps = tuple[Int64[Tensor, "_"], Int64[Tensor, "_"], Tensor, Tensor]
_LEAST = 16  # fields that are worth a thread's attention


def paste(fields: Float32[Tensor, "n S S"], boxes: Float[Tensor, "n 4"], size: tuple[int, int], threshold: float) -> list[Counts]:
    """Return where fields, stretched over boxes in an image of `size` (height, width), reach a threshold."""
    fields, boxes, height, width = fields.contiguous(), boxes.double().contiguous(), *size
    work, bound = library.function("fields_paste"), _below(threshold)

    def write(out: Tensor, starts: Tensor, needed: Tensor, first: int, end: int) -> None:
        scratch = torch.empty(7 * height + 4 * width)
        work(fields, boxes, fields.shape[1], bound, height, width, out, starts, needed, scratch, first, end)

    covered = (boxes[:, 2] - boxes[:, 0]).nan_to_num(0).clamp(0, width)
    return runs.written(write, runs.probable(covered.long()))


def parts(
    begins: Int64[Tensor, "n"], apart: Int64[Tensor, "n"], rows: Int64[Tensor, "n 4"], columns: Int64[Tensor, "n 4"]
) -> Int64[Tensor, "n 8"]:
    """Return what `resize` and `cut` need to know of parts of fields.

    Args:
        begins: where the cells of each begin.
        apart: how far apart their rows lie.
        rows: the first row of cells and their end, the first row of pixels to be made and their end.
        columns: the same.
    """
    return torch.stack([begins, apart, rows[:, 0], columns[:, 0], *rows[:, 2:].unbind(1), *columns[:, 2:].unbind(1)], 1)


def resize(
    cells: Float32[Tensor, "_"], parts: Int64[Tensor, "n 8"], rows: Taps, columns: Taps
) -> tuple[Float32[Tensor, "_"], Int64[Tensor, "n"]]:
    """Return parts of resized fields, one after the other, and where each begins.

    Args:
        cells: the numbers of all fields.
        parts: see the function of that name.
        rows: what each row of the whole result sees: which never go back.
        columns: what each column sees.
    """
    starts = runs.starts_of((parts[:, 5] - parts[:, 4]) * (parts[:, 7] - parts[:, 6]))
    out, work, taps = torch.empty(int(starts[-1])), library.function("fields_resize"), [*_passed(rows), *_passed(columns)]
    widest = int(columns[1][-1:].sum()) + 1

    def write(first: int, end: int) -> None:
        work(cells, parts, *taps, out, starts, torch.empty(widest), first, end)

    library.parallel_for(write, len(parts), _LEAST)
    return out, starts[:-1]


def cut(cells: Float32[Tensor, "_"], parts: Int64[Tensor, "n 8"], rows: Taps, columns: Taps, threshold: float) -> list[Counts]:
    """Return the run lengths of where fields, resized as by `resize` to the size of the image, exceed a threshold."""
    height, width = len(rows[0]), len(columns[0])
    work, bound, taps = library.function("fields_cut"), torch.tensor([threshold]), [*_passed(rows), *_passed(columns)]

    def write(out: Tensor, starts: Tensor, needed: Tensor, first: int, end: int) -> None:
        work(cells, parts, *taps, bound, height, width, out, starts, needed, torch.empty(5 * height), first, end)

    return runs.written(write, runs.probable(parts[:, 7] - parts[:, 6]))


def _passed(taps: Taps) -> list[Tensor]:
    low, high, near, far = taps
    return [low.int().contiguous(), high.int().contiguous(), near.float().contiguous(), far.float().contiguous()]


def _below(threshold: float) -> Float32[Tensor, "1"]:
    """Return the number before a threshold: what exceeds it reaches the threshold."""
    return torch.tensor([threshold]).nextafter(torch.tensor([-torch.inf]))
