"""Deformable attention by the C library, on a CPU, in float32 or float64: a single pass over the samples, no copies."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from maskset.kernels import library

_TYPES = {torch.float32: "f32", torch.float64: "f64"}
_LEAST = 2**14  # samples that are worth a thread's attention


def forward(
    value: Float[Tensor, "B S M D"],
    shapes: Sequence[tuple[int, int]],
    locations: Float[Tensor, "B Q M L P 2"],
    weights: Float[Tensor, "B Q M L P"],
) -> Float[Tensor, "B Q M*D"]:
    """Return the weighted sums; threads share the queries."""
    value, locations, weights = _alike(value, locations, weights)
    batch, queries, heads, levels, points = weights.shape
    out = value.new_empty(batch, queries, heads * value.shape[3])
    work, given = library.function(f"deformable_attention_{_TYPES[value.dtype]}"), (value, locations, weights, out)
    sizes, least = _sizes(value, shapes, weights), _LEAST // max(1, heads * levels * points)
    library.parallel_for(lambda first, end: work(*given, sizes, first, end), batch * queries, least)
    return out


def backward(
    grad: Float[Tensor, "B Q _"],
    value: Float[Tensor, "B S M D"],
    shapes: Sequence[tuple[int, int]],
    locations: Float[Tensor, "B Q M L P 2"],
    weights: Float[Tensor, "B Q M L P"],
) -> tuple[Float[Tensor, "B S M D"], Float[Tensor, "B Q M L P 2"], Float[Tensor, "B Q M L P"]]:
    """Return the gradients of value, locations and weights; threads share the heads, so that no cell has two writers."""
    grad, value, locations, weights = _alike(grad, value, locations, weights)
    gradients = torch.zeros_like(value), torch.empty_like(locations), torch.empty_like(weights)
    work, given = library.function(f"deformable_attention_backward_{_TYPES[value.dtype]}"), (value, locations, weights, grad)
    heads, sizes = value.shape[0] * value.shape[2], _sizes(value, shapes, weights)
    least = _LEAST * heads // max(1, weights.numel())
    library.parallel_for(lambda first, end: work(*given, *gradients, sizes, first, end), heads, least)
    return gradients


class _Sizes(ctypes.Structure):
    _fields_ = [("shapes", ctypes.POINTER(ctypes.c_int64))] + [
        (name, ctypes.c_ssize_t) for name in ("cells", "queries", "heads", "width", "levels", "points")
    ]


def _sizes(value: Tensor, shapes: Sequence[tuple[int, int]], weights: Tensor) -> Any:
    flat = [side for shape in shapes for side in shape]
    _, queries, heads, levels, points = weights.shape
    return ctypes.byref(
        _Sizes((ctypes.c_int64 * len(flat))(*flat), value.shape[1], queries, heads, value.shape[3], levels, points)
    )


def _alike(*tensors: Tensor) -> list[Tensor]:
    """Return the tensors without gaps and in one type: float64 where the weights, the last of them, are; else float32."""
    kind = torch.float64 if tensors[-1].dtype == torch.float64 else torch.float32
    return [tensor.detach().to(kind).contiguous() for tensor in tensors]
