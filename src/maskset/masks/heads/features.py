"""Mask features, one map per image from several levels, and their dynamic convolution (SOLOv2, section 3.2 and figure 3)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from maskset.layers.backbone import group_count
from maskset.layers.blocks import Layer


class MaskFeatureHead(nn.Module):
    """Resizes all levels to the same size and width, sums them and projects the sum to the output width.

    Each level passes one 3x3 convolution per upsampling or downsampling step, at least one. Norm and ReLU follow each of them.

    Args:
        channels: width of each level.
        upsampling_steps: log2 of each level's upsampling factor, such as 0, 1, 2, 3; -1 downsamples by 2.
        hidden: width of the sum.
        width: D, width of the output.
    """

    def __init__(self, channels: Sequence[int], upsampling_steps: Sequence[int], hidden: int, width: int) -> None:
        super().__init__()
        self.factors = [2.0 ** ((count > 0) - (count < 0)) for count in upsampling_steps]
        self.branches = nn.ModuleList(
            nn.ModuleList(ConvBlock(hidden if i else wide, hidden, 3) for i in range(max(1, abs(count))))
            for wide, count in zip(channels, upsampling_steps, strict=True)
        )
        self.output = ConvBlock(hidden, width, 1)

    def forward(self, levels: Sequence[Float[Tensor, "B _ _ _"]]) -> Float[Tensor, "B D h w"]:
        """Return the mask features, which are non-negative."""
        total = None
        for level, branch, factor in zip(levels, self.branches, self.factors, strict=True):
            assert isinstance(branch, nn.ModuleList)
            for block in branch:
                level = block(level)
                if factor != 1:
                    level = F.interpolate(level, scale_factor=factor, mode="bilinear", align_corners=False)
            total = level if total is None else total + level
        return self.output(total)


class ConvBlock(Layer):
    """A convolution without bias, group norm and ReLU.

    Args:
        channels: width of the input.
        width: of the output.
        size: side of the kernel, cells.
    """

    def __init__(self, channels: int, width: int, size: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, width, size, padding=size // 2, bias=False)
        self.norm = nn.GroupNorm(group_count(width), width)
        nn.init.normal_(self.convolution.weight, std=0.01)

    def forward(self, x: Float[Tensor, "B c h w"]) -> Float[Tensor, "B C h w"]:
        """Return a map of the same size."""
        return self.norm(self.convolution(x)).relu()


def with_coordinates(level: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C+2 h w"]:
    """Return the map with two more channels, x and y, from -1 in the first column or row to 1 in the last (CoordConv)."""
    batch, _, height, width = level.shape
    x = torch.linspace(-1, 1, width, dtype=level.dtype, device=level.device).expand(batch, 1, height, width)
    y = torch.linspace(-1, 1, height, dtype=level.dtype, device=level.device)[:, None].expand(batch, 1, height, width)
    return torch.cat([level, x, y], 1)


def dynamic_conv(features: Float[Tensor, "D h w"], kernels: Float[Tensor, "n D"]) -> Float[Tensor, "n h w"]:
    """Return the mask logits of each 1x1 kernel, without bias, applied to the mask features of an image (CondInst, ECCV 2020)."""
    return (kernels @ features.flatten(1)).unflatten(1, features.shape[1:])
