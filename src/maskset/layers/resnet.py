"""What some papers change in a ResNet: where a bottleneck has its stride, and deformable convolutions."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from maskset.errors import ConfigError
from maskset.layers.backbone import Backbone


def stride_in_first(backbone: Backbone) -> None:
    """Move the stride of every bottleneck from its 3x3 to its first 1x1 convolution, as the first ResNets (Caffe's) have it.

    Weights that were trained with the other place do not fit, though their shapes do; timm's hub has none for this one.

    Raises:
        ConfigError: the backbone is no ResNet of bottlenecks.
    """
    for path, block in _bottlenecks(backbone, "stride_in_first false"):
        if getattr(block, "aa", None) is not None and not isinstance(block.aa, nn.Identity):
            raise ConfigError(
                f"the backbone {backbone.name!r} has its stride in a filter ({path}): use model.backbone.stride_in_first false."
            )
        block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)
    backbone.stride_in_first = True


def deform(backbone: Backbone, stages: int = 3) -> None:
    """Make the 3x3 convolutions of the bottlenecks in the last `stages` stages deformable (DCN v2, Zhu et al., CVPR 2019).

    Raises:
        ConfigError: the backbone is no ResNet of bottlenecks.
    """
    for path, block in _bottlenecks(backbone, "deformable_stages 0"):
        if int(path[len("layer")]) > 4 - stages:
            block.conv2 = DeformableConvolution(block.conv2)


def _bottlenecks(backbone: Backbone, without: str) -> list[tuple[str, Any]]:
    from timm.models.resnet import Bottleneck  # slow to import

    blocks = [(path, block) for path, block in backbone.body.named_modules() if isinstance(block, Bottleneck)]
    if not blocks:
        raise ConfigError(
            f"the backbone {backbone.name!r} has no bottlenecks: use a ResNet-50 or deeper, or model.backbone.{without}."
        )
    return blocks


class DeformableConvolution(nn.Module):
    """A 3x3 convolution each of whose samples is moved and weighed by what a second convolution of the input says.

    Args:
        plain: what it stands for; at the start, samples are not moved and weigh one half each.
    """

    def __init__(self, plain: nn.Conv2d) -> None:
        super().__init__()
        self.stride = plain.stride[0]
        self.weight = plain.weight
        self.offset = nn.Conv2d(plain.in_channels, 27, 3, self.stride, padding=1)
        nn.init.zeros_(self.offset.weight)
        assert self.offset.bias is not None
        nn.init.zeros_(self.offset.bias)
        self.offset.requires_grad_(plain.weight.requires_grad)  # a frozen stage is frozen whole

    def forward(self, x: Float[Tensor, "B c h w"]) -> Float[Tensor, "B C H W"]:
        """Return a map of the same size, or half of it; computed in float32, since torchvision's operator takes one type only."""
        moved = self.offset(x).float()  # y and x of the nine samples in turn, cells, then their weights before the sigmoid
        with torch.autocast(x.device.type, enabled=False):
            stride = (self.stride, self.stride)
            return deform_conv2d(
                x.float(), moved[:, :18], self.weight.float(), None, stride, (1, 1), mask=moved[:, 18:].sigmoid()
            )
