"""Deformable attention: selection of the fastest implementation, and the PyTorch operator of the C and Triton ones.

The operator is computed by C (csrc/attention.c) on a CPU and by Triton on a GPU. For the backward pass it saves only its inputs:
value, locations and weights. The C functions take one pass over the samples, in float32 or float64, without copies. The plain
versions are in `attention_plain`.
"""

import ctypes
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from maskset.errors import AttentionError
from maskset.kernels import library
from maskset.kernels.attention_plain import Locations, Output, Shapes, Value, Weights, by_embedding_bag, by_gather, by_grid_sample
from maskset.kernels.self_check import triton_failure

ATTENTION_ENV = "MASKSET_ATTENTION"  # environment variable that names the implementation; the default is the fastest available
PLAIN = {"reference": by_grid_sample, "bag": by_embedding_bag, "gather": by_gather}
FUSED = {"c": "cpu", "triton": "cuda"}  # name and supported device type
_GPU = torch.device("cuda")
_TRITON = importlib.util.find_spec("triton") is not None
_TYPES = {torch.float32: "f32", torch.float64: "f64"}
_MIN_SAMPLES_PER_THREAD = 2**14


def deformable_attention(value: Value, shapes: Shapes, locations: Locations, weights: Weights) -> Output:
    """Return the weighted sum of P bilinear samples of each of L levels, for every query and head, in the type of `value`.

    All implementations agree up to rounding. A location that is NaN gives NaN.

    Args:
        value: the levels' cells, level after level, row-major, for each of M heads; S is the sum of all h * w.
        shapes: height and width of each level.
        locations: where to sample, x and y as fractions of the level; zero outside of [0, 1]. Float32, or as `value`.
        weights: of the samples.

    Raises:
        AttentionError: MASKSET_ATTENTION names an implementation that is not available here.
    """
    name = os.environ.get(ATTENTION_ENV) or _fastest(value)
    if name in PLAIN:
        return PLAIN[name](value.to(locations.dtype), shapes, locations, weights).to(value.dtype)
    _check_available(name, value)
    return fused(value, [side for shape in shapes for side in shape], locations, weights)


def implementations() -> dict[str, str | None]:
    """Return every implementation by name, with the reason why it is unavailable on this machine, or None."""
    return {name: _unavailable_reason(name) for name in (*FUSED, *PLAIN)}


@contextmanager
def using(name: str) -> Iterator[None]:
    """Use one implementation of deformable attention inside a `with` block, in all threads."""
    before = os.environ.get(ATTENTION_ENV)
    os.environ[ATTENTION_ENV] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[ATTENTION_ENV]
        else:
            os.environ[ATTENTION_ENV] = before


def _fastest(value: Tensor) -> str:
    if torch.compiler.is_exporting():
        return "gather"
    for name, device in FUSED.items():
        if value.device.type == device and _unavailable_reason(name, value.device) is None:
            return name
    return "bag" if value.shape[3] >= 8 else "reference"  # for narrow rows, the indices cost more than is saved


def _unavailable_reason(name: str, device: torch.device | None = None) -> str | None:
    if name == "c":
        return library.unavailable_reason()
    return _no_triton_reason(device) if name == "triton" else None


def _no_triton_reason(device: torch.device | None) -> str | None:
    if not torch.cuda.is_available():
        return "there is no GPU"
    if not _TRITON:
        return "Triton is not installed: `pip install triton`"
    return triton_failure(device or _GPU)


def _check_available(name: str, value: Tensor) -> None:
    """Raise an AttentionError if a fused implementation does not exist or is unavailable for this machine or tensor."""
    if name not in FUSED:
        raise AttentionError(f"there is no implementation {name!r} ({ATTENTION_ENV}); there are {', '.join([*FUSED, *PLAIN])}.")
    why = _unavailable_reason(name)
    if why is None and value.device.type != FUSED[name]:
        why = f"it is for tensors on {FUSED[name]}, these are on {value.device.type}"
    if why is not None:
        raise AttentionError(f"{ATTENTION_ENV}={name} cannot be used: {why}. Unset it to use the fastest available one.")


@torch.library.custom_op("maskset::deformable_attention", mutates_args=())
def fused(value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    """Return [B Q M*D] in the type of `value`; `shapes` is height, width, height, width, ...

    Raises:
        AttentionError: the tensors do not fit together.
    """
    check_attention(value, _pairs(shapes), locations, weights)
    return _functions(value)[0](value.contiguous(), _pairs(shapes), locations, weights).to(value.dtype)


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
    gradients = _functions(value)[1](grad.contiguous(), value.contiguous(), _pairs(shapes), locations, weights)
    return tuple(gradient.to(like.dtype) for gradient, like in zip(gradients, (value, locations, weights), strict=True))  # type: ignore[return-value]


@fused_backward.register_fake
def _(grad: Tensor, value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return value.new_empty(value.shape), locations.new_empty(locations.shape), weights.new_empty(weights.shape)


def _setup_context(ctx, inputs, output) -> None:
    value, ctx.shapes, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _backward(ctx, grad: Tensor):
    value, locations, weights = ctx.saved_tensors
    grad_value, grad_locations, grad_weights = fused_backward(grad, value, ctx.shapes, locations, weights)
    return grad_value, None, grad_locations, grad_weights


fused.register_autograd(_backward, setup_context=_setup_context)


def _functions(value: Tensor) -> tuple[Callable, Callable]:
    """Return the functions that compute the output and the gradients on the device of the values."""
    if value.is_cuda:
        triton = importlib.import_module("maskset.kernels.attention_triton")
        return triton.forward, triton.backward
    return forward, backward


def _pairs(shapes: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(shapes[::2], shapes[1::2], strict=True))


def check_attention(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor, grad: Tensor | None = None) -> None:
    """Raise an AttentionError where tensors do not fit together, so that a kernel would read out of bounds."""
    expected = (*value.shape[:1], *weights.shape[1:2], *value.shape[2:3], len(shapes), *weights.shape[-1:])
    sides = [side for shape in shapes for side in shape]
    fits = value.ndim == 4 and weights.shape == expected and locations.shape == (*expected, 2)
    if not fits or min(sides, default=0) < 0 or value.shape[1] != sum(h * w for h, w in shapes):
        raise AttentionError(
            f"value {list(value.shape)} (B S M D), locations {list(locations.shape)} (B Q M L P 2) and weights "
            f"{list(weights.shape)} (B Q M L P) do not fit together, or do not fit levels of {list(shapes)} (height, width)."
        )
    if grad is not None and grad.shape != (*weights.shape[:2], value.shape[2] * value.shape[3]):
        raise AttentionError(f"the gradient {list(grad.shape)} must have the shape of the output, [B Q M*D].")
    tensors = [value, locations, weights, *([] if grad is None else [grad])]
    if any(not tensor.is_floating_point() for tensor in tensors) or len({tensor.device for tensor in tensors}) > 1:
        got = ", ".join(f"{tensor.dtype} on {tensor.device}" for tensor in tensors)
        raise AttentionError(f"value, locations and weights must be floating-point tensors on one device, got {got}.")


def forward(value: Value, shapes: Shapes, locations: Locations, weights: Weights) -> Output:
    """Return the weighted sums; each thread takes some of the queries."""
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
    grad: Float[Tensor, "B Q _"], value: Value, shapes: Shapes, locations: Locations, weights: Weights
) -> tuple[Value, Locations, Weights]:
    """Return the gradients of value, locations and weights; each thread takes some of the heads: no cell has two writers."""
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


def _sizes(value: Tensor, shapes: Shapes, weights: Tensor) -> Any:
    flat = [side for shape in shapes for side in shape]
    _, queries, heads, levels, points = weights.shape
    return ctypes.byref(
        _Sizes((ctypes.c_int64 * len(flat))(*flat), value.shape[1], queries, heads, value.shape[3], levels, points)
    )


def _same_type(*tensors: Tensor) -> list[Tensor]:
    """Return contiguous tensors of one type: float64 if the last one, the weights, is float64, otherwise float32."""
    dtype = torch.float64 if tensors[-1].dtype == torch.float64 else torch.float32
    return [tensor.detach().to(dtype).contiguous() for tensor in tensors]
