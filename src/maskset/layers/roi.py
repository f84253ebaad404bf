"""Regions of interest: the level of a feature pyramid for each box, and its features on a grid (RoIAlign)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchvision.ops import roi_align

from maskset import boxes as box_ops
from maskset.layers.backbone import STRIDES

_SAMPLES = 2  # bilinear samples along each side of a cell
_CANONICAL_SIDE, _CANONICAL_LEVEL = 224, 2  # a box as large as a training crop of ImageNet is sampled at stride 16


def levels_of(boxes: Float[Tensor, "n 4"], count: int = len(STRIDES)) -> Int[Tensor, "n"]:
    """Return the level that each box is sampled from; level 0 has stride 4 (FPN; Lin et al., CVPR 2017, eq. 1).

    A box of 224 x 224 pixels belongs to the level of stride 16, one of twice the side to the next level. The area includes the
    part of a box that is outside of the image.
    """
    side = box_ops.area(boxes).sqrt()
    level = torch.floor(_CANONICAL_LEVEL + torch.log2(side / _CANONICAL_SIDE + 1e-8))
    return level.nan_to_num(0.0).clamp(0, count - 1).long()


def to_roi_dtype(levels: Sequence[Float[Tensor, "B C _ _"]], dtype: torch.dtype) -> list[Float[Tensor, "B C _ _"]]:
    """Return the levels in the type and memory format that torchvision's kernels read, so that many calls need one copy."""
    return [level.to(dtype, memory_format=torch.contiguous_format) for level in levels]


def pyramid_roi_align(
    levels: Sequence[Float[Tensor, "B C _ _"]], boxes: Float[Tensor, "B N 4"], size: int
) -> Float[Tensor, "B*N C s s"]:
    """Return the features of every box on a grid of size x size cells, box after box, image after image.

    A cell is the mean of 2 x 2 bilinear samples (RoIAlign; He et al., ICCV 2017; half-pixel convention) on the level of the box.
    Samples more than a cell outside of the padded map are zero; a box that is not finite gives the first cell. Boxes get no
    gradient. Computed in the type of the boxes, usually float32: the kernels take one type, and bfloat16 not on CPUs.

    Args:
        levels: strides 4, 8, ..., finest first.
        boxes: x0 y0 x1 y1, pixels.
        size: cells along each side.
    """
    flat = boxes.detach().flatten(0, 1).nan_to_num(0.0, 0.0, 0.0)
    image = torch.arange(len(boxes), device=boxes.device).repeat_interleave(boxes.shape[1])
    regions = torch.cat([image[:, None].to(flat.dtype), flat], 1)  # [n 5]
    level_of = levels_of(flat, len(levels))
    if boxes.is_meta or torch.compiler.is_compiling():
        return _from_every_level(levels, regions, level_of, size)
    order = level_of.argsort(stable=True)
    counts = (level_of[:, None] == torch.arange(len(levels), device=level_of.device)).sum(0).tolist()  # the only copy to the host
    groups = zip(levels, regions[order].split(counts), strict=True)
    parts = [_aligned(level, group, i, size) for i, (level, group) in enumerate(groups)]
    return torch.cat(parts).index_select(0, order.argsort())


def _from_every_level(
    levels: Sequence[Float[Tensor, "B C _ _"]], regions: Float[Tensor, "n 5"], level_of: Int[Tensor, "n"], size: int
) -> Float[Tensor, "n C s s"]:
    """Return the same, sampling every box from every level: no shape depends on a value, which tracing requires."""
    per_level = [_aligned(level, regions, i, size) * (level_of == i)[:, None, None, None] for i, level in enumerate(levels)]
    return torch.stack(per_level).sum(0)


def _aligned(level: Float[Tensor, "B C _ _"], regions: Float[Tensor, "n 5"], index: int, size: int) -> Float[Tensor, "n C s s"]:
    return roi_align(level.to(regions.dtype), regions, size, 1 / STRIDES[index], _SAMPLES, aligned=True)
