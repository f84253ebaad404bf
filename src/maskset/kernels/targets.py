"""Training targets drawn from run lengths by the C library (targets.c), on the CPU.

The library must be available. Every function raises a MasksetError for arguments that C cannot read safely.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from maskset.errors import MasksetError
from maskset.kernels import library
from maskset.kernels.fields import Taps, check_taps
from maskset.kernels.runs import View

_MIN_MASKS_PER_THREAD = 4


def crop(view: View, boxes: Float[Tensor, "T 4"], size: int) -> Bool[Tensor, "T S S"]:
    """Return each mask inside its box x0 y0 x1 y1, in pixels of the view, resampled to S x S pixels."""
    if not isinstance(size, int) or not 0 < size < 2**15:
        raise MasksetError(f"the size of a crop must be an integer from 1 to 2^15 - 1, got {size}.")
    boxes = library.check("boxes", boxes, (len(view), 4), *library.NUMBERS).double()
    crops = torch.zeros(len(view), size, size, dtype=torch.bool)
    targets_crop, c_view = library.function("targets_crop"), view.to_c()

    def write(first: int, end: int) -> None:
        pixels = torch.empty(len(view.rows) * len(view.columns), dtype=torch.uint8)
        places = torch.empty(len(view.rows) + 3 * size + 1, dtype=torch.int32)
        targets_crop(c_view, boxes, size, crops, pixels, places, first, end)

    library.parallel_for(write, len(view), _MIN_MASKS_PER_THREAD)
    return crops


def mean(view: View, rows: Taps, columns: Taps) -> Float[Tensor, "T h w"]:
    """Return weighted means of four pixels for each cell of a coarser grid.

    Args:
        view: of the masks; what lies beyond is background.
        rows: the taps of each row of the result.
        columns: the taps of each column.
    """
    rows, columns = check_taps("rows", rows), check_taps("columns", columns)
    means = torch.zeros(len(view), len(rows[0]), len(columns[0]))
    _draw("targets_mean", view, rows, columns, means)
    return means


def quarter(view: View, rows: Taps, columns: Taps) -> Bool[Tensor, "T h w"]:
    """Return where such means, with weights in 2048ths, are 1 after OpenCV's rounding."""
    rows, columns = check_taps("rows", rows, torch.int32), check_taps("columns", columns, torch.int32)
    cells = torch.zeros(len(view), len(rows[0]), len(columns[0]), dtype=torch.bool)
    _draw("targets_quarter", view, rows, columns, cells)
    return cells


def _draw(name: str, view: View, rows: Taps, columns: Taps, out: Tensor) -> None:
    function, weights = library.function(name), (*rows[2:], *columns[2:])
    near, far = (view.at(rows[i], columns[i]).to_c() for i in range(2))

    def write(first: int, end: int) -> None:
        function(near, far, *weights, out, torch.empty(4 * out.shape[1], dtype=torch.uint8), first, end)

    library.parallel_for(write, len(view), _MIN_MASKS_PER_THREAD)
