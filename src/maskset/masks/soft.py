"""Masks at a fraction of the image's size, with values between 0 and 1: what a predicted map is compared with."""

import torch
from jaxtyping import Float
from torch import Tensor

from maskset.instances import Masks
from maskset.kernels import library, targets

_PIXELS = 2**26  # that are decoded at a time


def central_means(masks: Masks, factor: int, size: tuple[int, int]) -> Float[Tensor, "T h w"]:
    """Return, for each block of factor x factor pixels, the mean of the four in its middle: 0, 0.25, 0.5, 0.75 or 1.

    This is bilinear resizing by 1 / factor (half-pixel convention, not antialiased). Computed where the masks are.

    Args:
        masks: of one image.
        factor: an even number.
        size: height and width h, w of the result, on the grid of the padded canvas; blocks outside of the image are 0.
    """
    if library.supports(masks.device):
        rows, columns = (factor * torch.arange(cells) + factor // 2 for cells in size)
        half = [torch.full((cells,), 0.5) for cells in size]
        return targets.mean(masks.view(), (rows - 1, rows, half[0], half[0]), (columns - 1, columns, half[1], half[1]))
    middle = slice(factor // 2 - 1, None, factor), slice(factor // 2, None, factor)
    chunk = max(1, _PIXELS // max(1, masks.size[0] * masks.size[1]))
    means = torch.zeros(len(masks), *size, device=masks.device)
    for start in range(0, len(masks), chunk):
        pixels = masks[start : start + chunk].dense()
        for rows in middle:
            for columns in middle:
                part = pixels[:, rows, columns]
                means[start : start + chunk, : part.shape[1], : part.shape[2]] += part
    return means / 4
