"""From the backbone's maps to the levels that a transformer reads."""

import math
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn


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
        self.norms = nn.ModuleList(nn.GroupNorm(math.gcd(32, width), width) for _ in convolutions)

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
