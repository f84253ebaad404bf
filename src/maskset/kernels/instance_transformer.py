"""SOIT's instance-aware transformer in C (instance_transformer.c): one pass over the cells, without intermediate results.

It is a PyTorch operator. For the backward pass it saves only its inputs and recomputes every cell.
The plain version is `maskset.masks.heads.instance_transformer`.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from maskset.errors import MasksetError
from maskset.kernels import library

LIMIT = 32  # of the channels and of heads * points, as in instance_transformer.c
_TYPES = {torch.float32: "f32", torch.float64: "f64"}
_GROUPS = 8  # of instances; each group sums the gradients of the map separately


def usable(features: Tensor, weights: Tensor, centers: Tensor, heads: int, points: int) -> bool:
    """Return whether the kernel supports a map [C h w], weights of its type, and this number of heads and points.

    The kernel computes no gradient of the centers.
    """
    channels, height, width = features.shape
    fits = channels <= LIMIT and heads * points <= LIMIT and channels % 2 == 0 and channels * height * width < 2**31
    same_type = features.dtype in _TYPES and weights.dtype == features.dtype
    differentiated = centers.requires_grad and torch.is_grad_enabled()
    return same_type and fits and not differentiated and library.supports(features.device)


@torch.library.custom_op("maskset::instance_transformer", mutates_args=())
def fused(
    features: Tensor,
    values: Tensor,
    rows: Tensor,
    columns: Tensor,
    row_in: Tensor,
    column_in: Tensor,
    mixing: Tensor,
    output: Tensor,
    heads: int,
) -> Tensor:
    """Return mask logits [n h w].

    Args:
        features: the queries, [h w C].
        values: the sampled map, [h w C], zero on padding.
        rows: position encoding of each row for each instance, [n 2 h C/2], for columns outside and inside the image.
        columns: position encoding of each column, [n 2 w C/2], for rows outside and inside the image.
        row_in: [h], uint8, whether a row lies inside the image.
        column_in: [w], the same for columns.
        mixing: [n C+1 3 S], weights (the last row: bias) from a query to x, y and score of each of S = heads * points samples.
        output: [n C+1], weights and bias from the sampled values to a logit.
        heads: M.

    Raises:
        MasksetError: the tensors do not fit together.
    """
    inputs = (features, values, rows, columns, row_in, column_in, mixing, output)
    sizes, addresses = _check(inputs, heads), _addresses(inputs)
    logits = features.new_empty(len(mixing), *features.shape[:2])
    work = library.function(f"instance_transformer_{_TYPES[features.dtype]}")
    library.parallel_for(lambda first, end: work(addresses, logits, sizes, first, end), len(mixing))
    return logits


@fused.register_fake
def _(features, values, rows, columns, row_in, column_in, mixing, output, heads) -> Tensor:
    return features.new_empty(mixing.shape[0], features.shape[0], features.shape[1])


@torch.library.custom_op("maskset::instance_transformer_backward", mutates_args=())
def fused_backward(grad: Tensor, inputs: Sequence[Tensor], heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of features, values, mixing and output; `inputs` are the tensors that `fused` takes, in order."""
    sizes, addresses = _check(inputs, heads), _addresses(inputs)
    features, *_, mixing, output = inputs
    grad = library.check("grad", grad, (len(mixing), *features.shape[:2]), features.dtype)
    groups = min(_GROUPS, len(mixing))
    grad_map = features.new_zeros(2, groups, *features.shape)
    grad_mixing, grad_output = torch.zeros_like(mixing), torch.zeros_like(output)
    gradients = _addresses((grad_map[0], grad_map[1], grad_mixing, grad_output))
    work = library.function(f"instance_transformer_backward_{_TYPES[features.dtype]}")
    library.parallel_for(lambda first, end: work(addresses, grad, gradients, groups, sizes, first, end), groups)
    grad_features, grad_values = grad_map.sum(1)
    return grad_features.clone(), grad_values.clone(), grad_mixing, grad_output


@fused_backward.register_fake
def _(grad, inputs, heads) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    features, values, *_, mixing, output = map(torch.empty_like, inputs)
    return features, values, mixing, output


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.heads = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad: Tensor):
    grad_features, grad_values, grad_mixing, grad_output = fused_backward(grad, ctx.saved_tensors, ctx.heads)
    return grad_features, grad_values, None, None, None, None, grad_mixing, grad_output, None


fused.register_autograd(_backward, setup_context=_setup_context)


class _Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ssize_t) for name in ("instances", "height", "width", "channels", "heads", "points")]


def _check(inputs: Sequence[Tensor], heads: int) -> Any:
    """Return the C structure of the sizes.

    Raises:
        MasksetError: the tensors do not fit together.
    """
    features, values, rows, columns, row_in, column_in, mixing, output = inputs
    dtype = library.check("features", features, (None, None, None), *_TYPES).dtype
    height, width, channels = features.shape
    count, samples = (mixing.shape[0], mixing.shape[-1]) if mixing.ndim == 4 else (0, 0)
    supported = 0 < channels <= LIMIT and 0 < samples <= LIMIT and channels * height * width < 2**31
    if not supported or channels % 2 or heads < 1 or channels % heads or samples % heads:
        raise MasksetError(
            f"the kernel needs an even number of channels and some samples, both multiples of the heads and up to {LIMIT}; "
            f"got {channels} channels, {samples} samples and {heads} heads."
        )
    library.check("values", values, (height, width, channels), dtype)
    library.check("rows", rows, (count, 2, height, channels // 2), dtype)
    library.check("columns", columns, (count, 2, width, channels // 2), dtype)
    library.check("row_in", row_in, (height,), torch.uint8)
    library.check("column_in", column_in, (width,), torch.uint8)
    library.check("mixing", mixing, (count, channels + 1, 3, samples), dtype)
    library.check("output", output, (count, channels + 1), dtype)
    return ctypes.byref(_Sizes(count, height, width, channels, heads, samples // heads))


def _addresses(tensors: Sequence[Tensor]) -> Any:
    """Return the addresses of the tensors, which must be contiguous, as a C structure."""
    return (ctypes.c_void_p * len(tensors))(*(library.address(tensor) for tensor in tensors))
