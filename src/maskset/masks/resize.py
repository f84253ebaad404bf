"""Rules for bilinear resizing: for each row or column of the result, which position of the source it reads.

A position counts cells of the source; 0 is the center of the first cell. A value between two cells is interpolated linearly,
a position outside of the source reads the nearest cell.

| rule               | used by                            | same as                                                        |
|--------------------|------------------------------------|----------------------------------------------------------------|
| `align_corners`    | SOIT: targets, painting            | `F.interpolate(..., align_corners=True)`                       |
| `half_pixel`       | ISDA, SOTR: painting               | `F.interpolate(..., align_corners=False)`, no antialiasing     |
| `aligned_bilinear` | SOIT: logits in losses, painting   | `aligned_bilinear` of CondInst (Tian et al., ECCV 2020)        |
"""

import torch
from jaxtyping import Float
from torch import Tensor

from maskset.kernels.runs import Taps

Positions = Float[Tensor, "_"]


def align_corners(cells: int, pixels: int) -> Positions:
    """Return positions that map the first and last pixel to the centers of the first and last cell."""
    if pixels == 1:
        return torch.zeros(1)
    return torch.arange(pixels, dtype=torch.float32) * ((cells - 1) / (pixels - 1))


def half_pixel(cells: int, pixels: int) -> Positions:
    """Return positions that map the borders of the result to the borders of the source."""
    return ((torch.arange(pixels, dtype=torch.float32) + 0.5) * (cells / pixels) - 0.5).clamp(0, cells - 1)


def aligned_bilinear(cells: int, factor: int) -> Positions:
    """Return positions for upsampling by a whole factor: pixel i reads (i - factor / 2) / factor."""
    return ((torch.arange(cells * factor, dtype=torch.float32) - factor // 2) / factor).clamp(0, cells - 1)


def resample(maps: Float[Tensor, "*n h w"], rows: Float[Tensor, "H"], columns: Float[Tensor, "W"]) -> Float[Tensor, "*n H W"]:
    """Return maps sampled bilinearly at the positions of rows and columns."""
    return _resample_axis(_resample_axis(maps, rows, -2), columns, -1)


def _resample_axis(maps: Tensor, positions: Positions, axis: int) -> Tensor:
    low, high, low_weight, high_weight = (part.to(maps.device) for part in taps(positions, maps.shape[axis]))
    if axis == -2:
        low_weight, high_weight = low_weight.unsqueeze(-1), high_weight.unsqueeze(-1)
    return maps.index_select(axis, low) * low_weight + maps.index_select(axis, high) * high_weight


def taps(positions: Positions, cells: int) -> Taps:
    """Return for each position the indices of the two cells around it, and the weight of each."""
    positions = positions.clamp(0, cells - 1)
    low = positions.floor()
    share = positions - low
    return low.long(), (low.long() + 1).clamp(max=cells - 1), 1 - share, share
