"""What losses look at, drawn from run lengths by the C library (targets.c), on the CPU, which must have it."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from maskset.kernels import library
from maskset.kernels.fields import Taps
from maskset.kernels.runs import View

_LEAST = 4  # masks that are worth a thread's attention


def crop(view: View, boxes: Float[Tensor, "T 4"], size: int) -> Bool[Tensor, "T S S"]:
    """Return each mask inside its box x0 y0 x1 y1 (pixels of the view): the plain twin is in maskset/masks/targets.py."""
    crops = torch.zeros(len(view), size, size, dtype=torch.bool)
    work, passed, boxes = library.function("targets_crop"), view.passed(), boxes.double().contiguous()

    def write(first: int, end: int) -> None:
        pixels = torch.empty(len(view.rows) * len(view.columns), dtype=torch.uint8)
        places = torch.empty(len(view.rows) + 3 * size + 1, dtype=torch.int32)
        work(passed, boxes, size, crops, pixels, places, first, end)

    library.parallel_for(write, len(view), _LEAST)
    return crops


def mean(view: View, rows: Taps, columns: Taps) -> Float[Tensor, "T h w"]:
    """Return weighted means of four pixels for each cell of a coarser grid.

    Args:
        view: of the masks; what lies beyond is background.
        rows: what each row of the result sees.
        columns: what each column sees.
    """
    near, far = (view.at(rows[i], columns[i]) for i in range(2))
    means = torch.zeros(len(view), len(rows[0]), len(columns[0]))
    weights = [weight.float().contiguous() for weight in (*rows[2:], *columns[2:])]
    _each(view, "targets_mean", near, far, weights, means)
    return means


def quarter(view: View, rows: Taps, columns: Taps) -> Bool[Tensor, "T h w"]:
    """Return where such means, with weights in 2048ths, are 1 when they are rounded as OpenCV rounds them."""
    near, far = (view.at(rows[i], columns[i]) for i in range(2))
    found = torch.zeros(len(view), len(rows[0]), len(columns[0]), dtype=torch.bool)
    _each(view, "targets_quarter", near, far, [weight.int().contiguous() for weight in (*rows[2:], *columns[2:])], found)
    return found


def _each(view: View, name: str, near: View, far: View, weights: list[Tensor], out: Tensor) -> None:
    work, passed = library.function(name), (near.passed(), far.passed())

    def write(first: int, end: int) -> None:
        work(*passed, *weights, out, torch.empty(4 * out.shape[1], dtype=torch.uint8), first, end)

    library.parallel_for(write, len(view), _LEAST)
