"""Deformable attention by the C library (attention.c), on the CPU, in float32 or float64: one pass, no copies."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from maskset.kernels import library
from maskset.kernels.attention_plain import check_attention

_TYPES = {torch.float32: "f32", torch.float64: "f64"}
_MIN_SAMPLES_PER_THREAD = 2**14


def forward(
    value: Float[Tensor, "B S M D"],
    shapes: Sequence[tuple[int, int]],
    locations: Float[Tensor, "B Q M L P 2"],
    weights: Float[Tensor, "B Q M L P"],
) -> Float[Tensor, "B Q M*D"]:
    """Return the weighted sums; threads share the queries."""
    check_attention(value, shapes, locations, weights)
    value, locations, weights = _same_type(value, locations, weights)
    batch, queries, heads, levels, points = weights.shape
    out = value.new_empty(batch, queries, heads * value.shape[3])
    function, sizes = library.function(f"deformable_attention_{_TYPES[value.dtype]}"), _sizes(value, shapes, weights)

    def work(first: int, end: int) -> None:
        function(value, locations, weights, out, sizes, first, end)

    library.parallel_for(work, batch * queries, _MIN_SAMPLES_PER_THREAD // max(1, heads * levels * points))
    return out


def backward(
    grad: Float[Tensor, "B Q _"],
    value: Float[Tensor, "B S M D"],
    shapes: Sequence[tuple[int, int]],
    locations: Float[Tensor, "B Q M L P 2"],
    weights: Float[Tensor, "B Q M L P"],
) -> tuple[Float[Tensor, "B S M D"], Float[Tensor, "B Q M L P 2"], Float[Tensor, "B Q M L P"]]:
    """Return the gradients of value, locations and weights; threads share the heads, so that no cell has two writers."""
    check_attention(value, shapes, locations, weights, grad)
    grad, value, locations, weights = _same_type(grad, value, locations, weights)
    gradients = torch.zeros_like(value), torch.empty_like(locations), torch.empty_like(weights)
    function, sizes = library.function(f"deformable_attention_backward_{_TYPES[value.dtype]}"), _sizes(value, shapes, weights)

    def work(first: int, end: int) -> None:
        function(value, locations, weights, grad, *gradients, sizes, first, end)

    heads = value.shape[0] * value.shape[2]
    library.parallel_for(work, heads, _MIN_SAMPLES_PER_THREAD * heads // max(1, weights.numel()))
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


def _same_type(*tensors: Tensor) -> list[Tensor]:
    """Return contiguous tensors of one type: float64 if the last one, the weights, is float64, otherwise float32."""
    dtype = torch.float64 if tensors[-1].dtype == torch.float64 else torch.float32
    return [tensor.detach().to(dtype).contiguous() for tensor in tensors]
