"""Variants of ResNet bottlenecks: the stride in the first convolution, and deformable convolutions."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from maskset.errors import ConfigError
from maskset.layers.backbone import Backbone


def stride_in_first(backbone: Backbone) -> None:
    """Move the stride of every bottleneck from its 3x3 to its first 1x1 convolution, as in the original (Caffe) ResNets.

    Weights of one variant load into the other without an error, but do not work there. timm has no weights of this variant.

    Raises:
        ConfigError: the backbone is not a ResNet with bottlenecks.
    """
    for path, block in _bottlenecks(backbone, "stride_in_first false"):
        if getattr(block, "aa", None) is not None and not isinstance(block.aa, nn.Identity):
            raise ConfigError(
                f"the backbone {backbone.name!r} has its stride in a filter ({path}): use model.backbone.stride_in_first false."
            )
        block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)
    backbone.stride_in_first = True


def deform(backbone: Backbone, stages: int = 3) -> None:
    """Replace the 3x3 convolutions in the bottlenecks of the last `stages` stages by deformable ones.

    Raises:
        ConfigError: the backbone is not a ResNet with bottlenecks.
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
    """A modulated deformable 3x3 convolution (DCN v2, Zhu et al., CVPR 2019).

    A second convolution of the input predicts an offset and a weight for each of the nine samples.

    Args:
        plain: the convolution that it replaces. Initially, offsets are zero and the weights of the samples are 0.5.
    """

    def __init__(self, plain: nn.Conv2d) -> None:
        super().__init__()
        self.stride = plain.stride[0]
        self.weight = plain.weight
        self.offset = nn.Conv2d(plain.in_channels, 27, 3, self.stride, padding=1)
        nn.init.zeros_(self.offset.weight)
        assert self.offset.bias is not None
        nn.init.zeros_(self.offset.bias)
        self.offset.requires_grad_(plain.weight.requires_grad)  # offsets of a frozen stage are frozen, too

    def forward(self, x: Float[Tensor, "B c h w"]) -> Float[Tensor, "B C H W"]:
        """Return a map of the same or half the size, computed in float32, since torchvision's operator takes only one type."""
        # [B 27 h w]: y and x of each sample in turn, cells; then the weights before the sigmoid
        predicted = self.offset(x).float()
        with torch.autocast(x.device.type, enabled=False):
            stride = (self.stride, self.stride)
            offsets, weights = predicted[:, :18], predicted[:, 18:].sigmoid()
            return deform_conv2d(x.float(), offsets, self.weight.float(), None, stride, (1, 1), mask=weights)
