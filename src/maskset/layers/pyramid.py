"""From the backbone's maps to the levels that a system reads."""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def group_count(width: int) -> int:
    """Return 32 groups, or as many as divide the channels, each of two channels at least: a single one on 1 x 1 is no group."""
    groups = math.gcd(32, width)
    return groups // 2 if 1 < groups == width else groups


class LevelProjection(nn.Module):
    """Brings every map to one width: a 1x1 convolution and group norm each (Deformable DETR, appendix A.2).

    Levels beyond the backbone's are 3x3 convolutions of stride 2: the first of the backbone's last map as it is (not of its
    projection), each further one of the level before.

    Args:
        channels: widths of the backbone's maps.
        width: C, of every level.
        levels: number of levels, at least one; fewer than maps take the last maps.
        bias: whether the convolutions have one (SOLQ), or leave it to the norm (systems that come from mmdetection).
    """

    def __init__(self, channels: Sequence[int], width: int, levels: int, bias: bool = True) -> None:
        super().__init__()
        used = list(channels)[-levels:]
        self.skipped = len(channels) - len(used)
        convolutions = [nn.Conv2d(c, width, 1, bias=bias) for c in used]
        for extra in range(levels - len(used)):
            convolutions.append(nn.Conv2d(used[-1] if extra == 0 else width, width, 3, stride=2, padding=1, bias=bias))
        for convolution in convolutions:
            nn.init.xavier_uniform_(convolution.weight)
            if convolution.bias is not None:
                nn.init.zeros_(convolution.bias)
        self.convolutions = nn.ModuleList(convolutions)
        self.norms = nn.ModuleList(nn.GroupNorm(group_count(width), width) for _ in convolutions)

    def forward(self, maps: Sequence[Tensor]) -> list[Float[Tensor, "B C h w"]]:
        """Return the levels, finest first."""
        sources = list(maps)[self.skipped :]
        levels: list[Tensor] = []
        for i, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            if i < len(sources):
                source = sources[i]
            else:
                source = sources[-1] if i == len(sources) else levels[-1]
            levels.append(norm(convolution(source)))
        return levels


class FeaturePyramid(nn.Module):
    """Brings every map to one width and adds to each what the coarser ones saw (FPN; Lin et al., CVPR 2017, figure 3).

    Detectron2's: convolutions with a bias and without a norm, the coarser map is doubled by nearest neighbor and added.

    Args:
        channels: widths of the backbone's maps, of which each has half the cells of the one before along each side.
        width: C, of every level.
    """

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.output = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in channels)
        for convolution in (*self.lateral, *self.output):
            assert isinstance(convolution, nn.Conv2d)
            assert convolution.bias is not None
            nn.init.kaiming_uniform_(convolution.weight, a=1)
            nn.init.zeros_(convolution.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Float[Tensor, "B C h w"]]:
        """Return one level for each map, finest first. The canvas must be a multiple of the last map's stride."""
        sums: list[Tensor] = []
        for source, lateral in zip(reversed(maps), reversed(self.lateral), strict=True):
            level = lateral(source)
            sums.append(level + F.interpolate(sums[-1], scale_factor=2, mode="nearest") if sums else level)
        return [output(level) for level, output in zip(reversed(sums), self.output, strict=True)]
