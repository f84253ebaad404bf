"""Deformable attention as one operator of PyTorch, computed by C on a CPU and by Triton on a GPU.

Between forward and backward it keeps what it was given: value, locations and weights.
"""

import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from maskset.errors import MasksetError
from maskset.kernels import attention_c


@torch.library.custom_op("maskset::deformable_attention", mutates_args=())
def fused(value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    """Return [B Q M*D] in the type of `value`; `shapes` is height, width, height, width, ...

    Raises:
        ValueError: the tensors do not fit together, and a kernel would read what is not theirs.
    """
    _check(value, _pairs(shapes), locations, weights)
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
    gradients = _kernels(value).backward(grad.contiguous(), value.contiguous(), _pairs(shapes), locations, weights)
    return tuple(found.to(like.dtype) for found, like in zip(gradients, (value, locations, weights), strict=True))  # type: ignore[return-value]


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


def _check(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> None:
    batch, cells, heads, _ = value.shape
    expected = (batch, weights.shape[1], heads, len(shapes), weights.shape[-1])
    if cells != sum(h * w for h, w in shapes) or weights.shape != expected or locations.shape != (*expected, 2):
        raise MasksetError(
            f"value {list(value.shape)} (B S M D), locations {list(locations.shape)} (B Q M L P 2) and weights "
            f"{list(weights.shape)} (B Q M L P) do not fit together, or not levels of {list(shapes)} (height, width)."
        )


def _kernels(value: Tensor) -> ModuleType:
    if value.is_cuda:
        return importlib.import_module("maskset.kernels.attention_triton")
    return attention_c


def _pairs(shapes: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(shapes[::2], shapes[1::2], strict=True))
