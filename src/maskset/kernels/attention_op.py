"""Deformable attention as a PyTorch operator, computed by C on a CPU and by Triton on a GPU.

For the backward pass it saves only its inputs: value, locations and weights.
"""

import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from maskset.kernels import attention_c
from maskset.kernels.attention_plain import check_attention


@torch.library.custom_op("maskset::deformable_attention", mutates_args=())
def fused(value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    """Return [B Q M*D] in the type of `value`; `shapes` is height, width, height, width, ...

    Raises:
        AttentionError: the tensors do not fit together.
    """
    check_attention(value, _pairs(shapes), locations, weights)
    return _kernels(value).forward(value.contiguous(), _pairs(shapes), locations, weights).to(value.dtype)


@fused.register_fake
def _(value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    batch, queries, heads = weights.shape[:3]
    return value.new_empty(batch, queries, heads * value.shape[3])


@torch.library.custom_op("maskset::deformable_attention_backward", mutates_args=())
def fused_backward(
    grad: Tensor, value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of value, locations and weights."""
    check_attention(value, _pairs(shapes), locations, weights, grad)
    gradients = _kernels(value).backward(grad.contiguous(), value.contiguous(), _pairs(shapes), locations, weights)
    return tuple(gradient.to(like.dtype) for gradient, like in zip(gradients, (value, locations, weights), strict=True))  # type: ignore[return-value]


@fused_backward.register_fake
def _(grad: Tensor, value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return value.new_empty(value.shape), locations.new_empty(locations.shape), weights.new_empty(weights.shape)


def _keep(ctx, inputs, output) -> None:
    value, ctx.shapes, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _differentiate(ctx, grad: Tensor):
    value, locations, weights = ctx.saved_tensors
    of_value, of_locations, of_weights = fused_backward(grad, value, ctx.shapes, locations, weights)
    return of_value, None, of_locations, of_weights


fused.register_autograd(_differentiate, setup_context=_keep)


def _kernels(value: Tensor) -> ModuleType:
    if value.is_cuda:
        return importlib.import_module("maskset.kernels.attention_triton")
    return attention_c


def _pairs(shapes: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(shapes[::2], shapes[1::2], strict=True))
