"""Dynamic convolution: masks from kernels that the network predicts (CondInst, ECCV 2020; SOLOv2, NeurIPS 2020)."""

from jaxtyping import Float
from torch import Tensor


def dynamic_conv(features: Float[Tensor, "D h w"], kernels: Float[Tensor, "n D"]) -> Float[Tensor, "n h w"]:
    """Return the mask logits of each 1x1 kernel, without bias, applied to the mask features of an image."""
    return (kernels @ features.flatten(1)).unflatten(1, features.shape[1:])
