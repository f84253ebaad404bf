"""Masks inside boxes: crop them for targets, binarise and paste them for results.

On a CPU the C library does the work (targets.c, fields.c); what is here is for other devices, and where there is no library.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchvision.ops import roi_align

from maskset import rle
from maskset.errors import MasksetError
from maskset.instances import Masks
from maskset.kernels import fields as by_fields
from maskset.kernels import library, targets


def crop(masks: Masks, boxes: Float[Tensor, "T 4"], size: int) -> Bool[Tensor, "T S S"]:
    """Return each mask inside its box, resampled to size x size pixels.

    Each pixel is the mean of ceil(box / size) bilinear samples along each axis (RoIAlign, half-pixel convention), set where
    the mean reaches 0.5: the targets of SOLQ. Samples near the border of a box see pixels just outside of it. A box without an
    area, or that is not finite, has an empty mask.

    Args:
        masks: of one image.
        boxes: x0 y0 x1 y1, pixels of that image.
        size: side S of the result, pixels.

    Raises:
        ValueError: there are not as many boxes as masks.
    """
    if len(boxes) != len(masks):
        raise MasksetError(f"crop needs a box for each mask, got {len(boxes)} boxes and {len(masks)} masks.")
    if library.supports(masks.device) and library.supports(boxes.device):
        return targets.crop(masks.view(), boxes, size)
    crops = torch.zeros(len(masks), size, size, dtype=torch.bool, device=boxes.device)
    height, width = masks.size
    for i, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        if not (-math.inf < x0 < x1 < math.inf and -math.inf < y0 < y1 < math.inf):
            continue
        # A window of whole pixels with one to spare gives the same samples as the whole image, for less.
        left, top = max(int(x0) - 2, 0), max(int(y0) - 2, 0)
        right, bottom = min(int(x1) + 3, width), min(int(y1) + 3, height)
        if right <= left or bottom <= top:
            continue
        window = masks[i].cropped((left, top, right, bottom)).dense().to(boxes.device, torch.float32)
        shifted = boxes[i] - boxes.new_tensor([left, top, left, top])
        crops[i] = roi_align(window[None], [shifted[None].float()], size, sampling_ratio=-1, aligned=True)[0, 0] >= 0.5
    return crops


def binarise(fields: Float[Tensor, "n S S"]) -> Bool[Tensor, "n S S"]:
    """Return where each decoded mask exceeds the middle between its own least and greatest value; a flat one is empty."""
    flat = fields.flatten(1)
    middle = (flat.amax(1) + flat.amin(1)) / 2
    return fields > middle[:, None, None]


def paste(masks: Bool[Tensor, "n S S"], boxes: Float[Tensor, "n 4"], size: tuple[int, int]) -> Masks:
    """Return box-local masks as masks of an image of `size` (height, width).

    A pixel of the image is set where bilinear sampling of the box-local mask at the pixel's centre gives at least 0.5, with
    zero around it (detectron2's rule, which SOLQ uses). Only the pixels that a box can reach are computed.
    """
    return paste_soft(masks.float(), boxes, size, 0.5)


def paste_soft(fields: Float[Tensor, "n S S"], boxes: Float[Tensor, "n 4"], size: tuple[int, int], threshold: float) -> Masks:
    """Return box-local fields as masks of an image of `size` (height, width), set where their samples reach the threshold.

    The field is sampled first and cut afterwards (detectron2's rule, as ISTR uses it): see `paste`, which samples what was cut.
    """
    height, width = rle.check_size(size)
    if library.handle() is not None:  # what becomes of fields on a GPU is wanted on the CPU
        return Masks(by_fields.paste(fields.float().cpu(), boxes.cpu(), size, threshold), size)
    counts = []
    for field, (x0, y0, x1, y1) in zip(fields, boxes.tolist(), strict=True):
        # A sample half a cell outside of the box still sees half of the outermost cell, hence the margin.
        left, right = _reach(x0, x1, fields.shape[1], width)
        top, bottom = _reach(y0, y1, fields.shape[1], height)
        if right <= left or bottom <= top:
            counts.append(torch.tensor([height * width], dtype=torch.int32))
            continue
        weights_y = _bilinear(top, bottom, y0, y1, fields.shape[1]).to(field.device)
        weights_x = _bilinear(left, right, x0, x1, fields.shape[1]).to(field.device)
        window = weights_y @ field @ weights_x.T >= threshold
        counts.append(rle.placed(window, left, top, size).cpu())
    return Masks(counts, size)


def _reach(low: float, high: float, cells: int, length: int) -> tuple[int, int]:
    """Return the first and the end of the pixels, out of `length`, whose centre a mask from low to high can touch."""
    margin = abs(high - low) / cells
    if not (high > low):
        return 0, 0
    return int(min(max(low - margin - 1, 0), length)), int(min(max(high + margin + 1, 0), length))


def _bilinear(first: int, end: int, low: float, high: float, cells: int) -> Float[Tensor, "pixels cells"]:
    """Return the weight of each cell of a mask that spans [low, high] in the sample at each pixel's centre."""
    centres = torch.arange(first, end, dtype=torch.float32) + 0.5
    position = (centres - low) / (high - low) * cells - 0.5
    return (1 - (position[:, None] - torch.arange(cells, dtype=torch.float32)[None, :]).abs()).clamp(min=0)
