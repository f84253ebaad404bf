"""Masks at a quarter of each side, still 0 or 1: OpenCV's bilinear resize of bytes, which computes in whole numbers."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from maskset.instances import Masks
from maskset.kernels import library, targets

_UNIT = 2048  # what a weight of 1 is: OpenCV has 11 bits


def quarter_masks(masks: Masks, size: tuple[int, int]) -> Bool[Tensor, "T h w"]:
    """Return masks as cv2.resize(mask, (int(w / 4 + 0.5), int(h / 4 + 0.5))) gives them, where the masks are.

    Only the columns that an object covers are decoded. Where both sides are multiples of 4 a cell is set if two of the four
    pixels in its middle are.

    Args:
        masks: of one image.
        size: height and width h, w of the result, on the grid of the padded canvas; cells outside of the image are not set.
    """
    height, width = masks.size
    rows, columns = (_taps(pixels, int(pixels / 4 + 0.5), masks.device) for pixels in (height, width))
    if library.supports(masks.device):
        return targets.quarter(masks.view(), rows.on(size[0], height), columns.on(size[1], width))
    found = torch.zeros(len(masks), *size, dtype=torch.bool, device=masks.device)
    for one, (left, _, right, _), place in zip(masks, masks.boxes().tolist(), found, strict=True):
        cells = ((columns.high >= left) & (columns.low < right)).nonzero()[:, 0].tolist()
        if right > left and cells:
            first, end = cells[0], cells[-1] + 1
            window = one.cropped((int(columns.low[first]), 0, int(columns.high[end - 1]) + 1, height)).dense()[0]
            place[: len(rows.low), first:end] = _resized(window, rows, columns.part(first, end))
    return found


@dataclass(frozen=True)
class _Taps:
    """For every cell along one axis: the pixel that it looks at, the next one, and what each of them weighs."""

    low: Int[Tensor, "n"]
    high: Int[Tensor, "n"]
    near: Int[Tensor, "n"]
    far: Int[Tensor, "n"]

    def part(self, first: int, end: int) -> "_Taps":
        """Return those of a stretch of cells, in pixels from the first that they look at."""
        low, high = self.low[first:end], self.high[first:end]
        return _Taps(low - low[0], high - low[0], self.near[first:end], self.far[first:end])

    def on(self, cells: int, pixels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return low, high, near and far for a grid of so many cells, of which those beyond the image look beyond its pixels."""
        beyond = (0, cells - len(self.low))
        low, high = F.pad(self.low, beyond, value=pixels), F.pad(self.high, beyond, value=pixels)
        return low, high, F.pad(self.near, beyond), F.pad(self.far, beyond)


def _taps(pixels: int, cells: int, device: torch.device) -> _Taps:
    place = ((torch.arange(cells, dtype=torch.float64) + 0.5) * pixels / max(1, cells) - 0.5).float()  # on any device the same
    low = place.floor()
    share = (place - low).masked_fill((low < 0) | (low >= pixels - 1), 0)
    low = low.long().clamp(0, max(0, pixels - 1))
    weights = (((1 - share) * _UNIT).round().int(), (share * _UNIT).round().int())
    taps = (low, (low + 1).clamp(max=max(0, pixels - 1)), *weights)
    return _Taps(*(each.to(device) for each in taps))


def _resized(pixels: Bool[Tensor, "H W"], rows: _Taps, columns: _Taps) -> Bool[Tensor, "h w"]:
    """Return a mask resized along x, then along y, with each product cut to fewer bits as OpenCV does."""
    sums = pixels[:, columns.low] * columns.near + pixels[:, columns.high] * columns.far
    upper, lower = rows.near[:, None] * (sums[rows.low] >> 4), rows.far[:, None] * (sums[rows.high] >> 4)
    return (((upper >> 16) + (lower >> 16) + 2) >> 2) > 0
