"""Training targets from the masks of one image, one function for each rule that a system uses.

| function                 | used by              | rule                                               | C function              |
|--------------------------|----------------------|----------------------------------------------------|-------------------------|
| `crop`                   | SOLQ, ISTR*, Sextant | RoIAlign in the box, >= 0.5 (detectron2)           | `targets_crop`          |
| `downsample_by_stride`   | ISDA                 | bilinear by 1 / stride, half-pixel (`interpolate`) | `targets_resize`        |
| `downsample_by_4_opencv` | SOTR                 | `cv2.resize` of bytes by 1 / 4 (mmcv, `imrescale`) | `targets_resize_opencv` |
| `resize_align_corners`   | SOIT                 | bilinear, `align_corners=True`, of the padded mask | `targets_resize`        |
| `centers_of_mass`        | SOTR                 | mean y and x of the pixels (scipy)                 | none                    |

ISTR* is ISTR and ISTR-SMT. Masks on the CPU are processed by C (kernels/runs.py, kernels/csrc/targets.c) where the library is
available. The Python code here is the reference that the C code is tested against (tests/kernels/test_targets.py). It also runs
on other devices.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchvision.ops import roi_align

from maskset.errors import MasksetError
from maskset.instances import Masks
from maskset.kernels import library, runs
from maskset.masks.resize import align_corners, resample, taps

_OPENCV_UNIT = 2048  # OpenCV's fixed-point representation of a weight of 1 (11 bits)
_MAX_PIXELS = 2**26  # decoded at a time


def crop(masks: Masks, boxes: Float[Tensor, "T 4"], size: int) -> Bool[Tensor, "T S S"]:
    """Return each mask cropped to its box and resampled to size x size pixels.

    Each pixel is the mean of ceil(box / size) bilinear samples along each axis (RoIAlign, half-pixel convention), set where
    the mean is at least 0.5. Samples near the border of a box also read pixels just outside of it. A box without area, or
    with a coordinate that is not finite, gives an empty mask.

    Args:
        masks: of one image.
        boxes: x0 y0 x1 y1, pixels of that image.
        size: side S of the result, pixels.

    Raises:
        MasksetError: there is not one box of four numbers for each mask.
    """
    if boxes.shape != (len(masks), 4):
        raise MasksetError(
            f"crop needs a box x0 y0 x1 y1 for each mask, a tensor of shape [{len(masks)}, 4], got {list(boxes.shape)}."
        )
    if library.supports(masks.device) and library.supports(boxes.device):
        return runs.crop(masks.to_c_view(), boxes, size)  # Fast path: kernels/csrc/targets.c, targets_crop
    crops = torch.zeros(len(masks), size, size, dtype=torch.bool, device=boxes.device)
    height, width = masks.size
    for i, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        if not (-math.inf < x0 < x1 < math.inf and -math.inf < y0 < y1 < math.inf):
            continue
        # A window of whole pixels with a margin of one gives the same samples as the whole image, in less time.
        left, top = max(int(x0) - 2, 0), max(int(y0) - 2, 0)
        right, bottom = min(int(x1) + 3, width), min(int(y1) + 3, height)
        if right <= left or bottom <= top:
            continue
        window = masks[i].cropped((left, top, right, bottom)).dense().to(boxes.device, torch.float32)
        shifted = boxes[i] - boxes.new_tensor([left, top, left, top])
        crops[i] = roi_align(window[None], [shifted[None].float()], size, sampling_ratio=-1, aligned=True)[0, 0] >= 0.5
    return crops


def downsample_by_stride(masks: Masks, factor: int, size: tuple[int, int]) -> Float[Tensor, "T h w"]:
    """Return for each block of factor x factor pixels the mean of its central four: 0, 0.25, 0.5, 0.75 or 1.

    This is bilinear resizing by 1 / factor (half-pixel convention, no antialiasing). The result is on the device of the masks.

    Args:
        masks: of one image.
        factor: side of a block, pixels; even.
        size: height and width h, w of the result, which covers the padded canvas; blocks outside of the image are 0.
    """
    if library.supports(masks.device):  # Fast path: kernels/csrc/targets.c, targets_resize
        rows, columns = (factor * torch.arange(cells) + factor // 2 for cells in size)
        half = [torch.full((cells,), 0.5, dtype=torch.float32) for cells in size]
        return runs.resize(masks.to_c_view(), (rows - 1, rows, half[0], half[0]), (columns - 1, columns, half[1], half[1]))
    central = slice(factor // 2 - 1, None, factor), slice(factor // 2, None, factor)
    chunk = max(1, _MAX_PIXELS // max(1, masks.size[0] * masks.size[1]))
    sums = torch.zeros(len(masks), *size, dtype=torch.float32, device=masks.device)
    for start in range(0, len(masks), chunk):
        pixels = masks[start : start + chunk].dense()
        for rows in central:
            for columns in central:
                part = pixels[:, rows, columns][:, : size[0], : size[1]]
                sums[start : start + chunk, : part.shape[1], : part.shape[2]] += part
    return sums / 4


def resize_align_corners(
    masks: Masks, canvas: tuple[int, int], size: tuple[int, int], device: torch.device
) -> Float[Tensor, "T H W"]:
    """Return masks, zero-padded to a canvas, after a bilinear resize with `align_corners=True`. Borders become soft.

    Args:
        masks: of one image.
        canvas: height and width of the padded batch, pixels.
        size: height and width of the result.
        device: of the result.
    """
    rows, columns = align_corners(canvas[0], size[0]), align_corners(canvas[1], size[1])
    if library.supports(masks.device):  # Fast path: kernels/csrc/targets.c, targets_resize
        return runs.resize(masks.to_c_view(), taps(rows, canvas[0]), taps(columns, canvas[1])).to(device)
    resized = torch.zeros(len(masks), *size, dtype=torch.float32, device=device)
    for i in range(len(masks)):  # one mask at full size at a time
        dense = masks[i].dense().to(device)
        padded = F.pad(dense, (0, canvas[1] - dense.shape[2], 0, canvas[0] - dense.shape[1])).float()
        resized[i] = resample(padded, rows, columns)[0]
    return resized


def centers_of_mass(masks: Masks) -> tuple[Int[Tensor, "T"], Float[Tensor, "T 2"]]:
    """Return the area of each mask in pixels and the mean y and x of its pixels (the first pixel is 0), on the CPU.

    Computed from run lengths. The sums are exact, the quotient is float32. The center of an empty mask is 0, 0.
    """
    height, counts = masks.size[0], masks.rle()
    moments = torch.zeros(len(counts), 3, dtype=torch.int64)
    if not counts:
        return moments[:, 0], moments[:, 1:].float()
    lengths, numbers = torch.cat(counts).cpu().long(), [len(mask) for mask in counts]  # one copy for all masks
    owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(numbers))
    ends = torch.cat([mask.cumsum(0) for mask in lengths.split(numbers)])
    is_set = torch.cat([torch.arange(number) % 2 == 1 for number in numbers])
    ends, lengths = ends[is_set], lengths[is_set]
    moments.index_add_(0, owner[is_set], _sums_before(ends, height) - _sums_before(ends - lengths, height))
    return moments[:, 0], moments[:, 1:].float() / moments[:, :1].clamp(min=1).float()


def _sums_before(end: Int[Tensor, "n"], height: int) -> Int[Tensor, "n 3"]:
    """Return the count, the sum of y and the sum of x of the first `end` pixels, column by column."""
    columns, remainder = end // height, end % height
    sum_y = columns * (height * (height - 1) // 2) + remainder * (remainder - 1) // 2
    sum_x = height * (columns * (columns - 1) // 2) + remainder * columns
    return torch.stack([end, sum_y, sum_x], 1)


def downsample_by_4_opencv(masks: Masks, size: tuple[int, int]) -> Bool[Tensor, "T h w"]:
    """Return masks as `cv2.resize(mask, (int(w / 4 + 0.5), int(h / 4 + 0.5)))` computes them, on the device of the masks.

    OpenCV resizes bytes bilinearly in integers. Where both sides of the image are multiples of 4, a cell is set if two or
    more of its four central pixels are.

    Args:
        masks: of one image.
        size: height and width h, w of the result, which covers the padded canvas; cells outside of the image are not set.
    """
    rows, columns = (_opencv_taps(pixels, cells) for pixels, cells in zip(masks.size, size, strict=True))
    if library.supports(masks.device):  # Fast path: kernels/csrc/targets.c, targets_resize_opencv
        return runs.resize_as_opencv(masks.to_c_view(), rows, columns)
    resized = torch.zeros(len(masks), *size, dtype=torch.bool, device=masks.device)
    for i in range(len(masks)):  # one mask at full size at a time
        resized[i] = _opencv_resize(F.pad(masks[i].dense()[0], (0, 1, 0, 1)), rows, columns)
    return resized


def _opencv_taps(pixels: int, cells: int) -> runs.Taps:
    """Return the two pixels that each cell reads along an axis, and their weights in units of 1 / 2048.

    Cells beyond the image read pixel number `pixels`, which is background.
    """
    inside = int(pixels / 4 + 0.5)
    position = ((torch.arange(inside, dtype=torch.float64) + 0.5) * pixels / max(1, inside) - 0.5).float()
    low = position.floor()
    share = (position - low).masked_fill((low < 0) | (low >= pixels - 1), 0)
    low = low.long().clamp(0, max(0, pixels - 1))
    high = (low + 1).clamp(max=max(0, pixels - 1))
    low_weight, high_weight = ((weight * _OPENCV_UNIT).round().int() for weight in (1 - share, share))
    beyond = (0, cells - inside)
    low, high = F.pad(low, beyond, value=pixels), F.pad(high, beyond, value=pixels)
    return low, high, F.pad(low_weight, beyond), F.pad(high_weight, beyond)


def _opencv_resize(pixels: Bool[Tensor, "H W"], rows: runs.Taps, columns: runs.Taps) -> Bool[Tensor, "h w"]:
    """Return a mask resized along x, then along y, with each product shifted to fewer bits as OpenCV does."""
    top, bottom, top_weight, bottom_weight = (part.to(pixels.device) for part in rows)
    left, right, left_weight, right_weight = (part.to(pixels.device) for part in columns)
    sums = pixels[:, left] * left_weight + pixels[:, right] * right_weight
    upper = top_weight[:, None] * (sums[top] >> 4)
    lower = bottom_weight[:, None] * (sums[bottom] >> 4)
    return (((upper >> 16) + (lower >> 16) + 2) >> 2) > 0
