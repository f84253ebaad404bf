"""The instance-aware transformer by the C library: one pass over the cells, nothing in between is stored.

As an operator of PyTorch it keeps its inputs between forward and backward, and looks at every cell again to differentiate.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from maskset.kernels import library

LIMIT = 32  # of the channels, and of heads * points: instances.c has room for so many
_TYPES = {torch.float32: "f32", torch.float64: "f64"}
_GROUPS = 8  # of instances, each of which sums gradients for the map by itself


def usable(features: Tensor, weights: Tensor, centres: Tensor, heads: int, points: int) -> bool:
    """Return whether there is a kernel for a map [C h w] on its device, in its type and with so many heads and points.

    The weights must be of the same type, and nobody may want the gradient of the centres.
    """
    channels, height, width = features.shape
    fits = channels <= LIMIT and heads * points <= LIMIT and channels % 2 == 0 and channels * height * width < 2**31
    typed = features.dtype in _TYPES and weights.dtype == features.dtype
    learnt = centres.requires_grad and torch.is_grad_enabled()
    return features.device.type == "cpu" and typed and fits and not learnt and library.handle() is not None


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
        features: what asks, [h w C].
        values: what is seen, [h w C]: zero on padding.
        rows: where an instance sees each row, [n 2 h C/2], in columns beside the image and in it.
        columns: where it sees each column, [n 2 w C/2], in rows beside the image and in it.
        row_in: [h] whether a row is the image's, uint8.
        column_in: [w] whether a column is.
        mixing: [n C+1 3 S], how a query (the last row: its bias) becomes x, y and score of each of S = heads * points samples.
        output: [n C+1], how what was seen becomes a logit.
        heads: M.
    """
    logits = features.new_empty(len(mixing), *features.shape[:2])
    inputs, sizes = _inputs(features, values, rows, columns, row_in, column_in, mixing, output), _sizes(features, mixing, heads)
    work = library.function(f"instance_transformer_{_TYPES[features.dtype]}")
    library.parallel_for(lambda first, end: work(inputs, logits, sizes, first, end), len(mixing))
    return logits


@fused.register_fake
def _(features, values, rows, columns, row_in, column_in, mixing, output, heads) -> Tensor:
    return features.new_empty(mixing.shape[0], features.shape[0], features.shape[1])


@torch.library.custom_op("maskset::instance_transformer_backward", mutates_args=())
def fused_backward(
    grad: Tensor,
    features: Tensor,
    values: Tensor,
    rows: Tensor,
    columns: Tensor,
    row_in: Tensor,
    column_in: Tensor,
    mixing: Tensor,
    output: Tensor,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of features, values, mixing and output."""
    groups = min(_GROUPS, len(mixing))
    of_map = features.new_zeros(2, groups, *features.shape)
    of_mixing, of_output = torch.zeros_like(mixing), torch.zeros_like(output)
    inputs, sizes = _inputs(features, values, rows, columns, row_in, column_in, mixing, output), _sizes(features, mixing, heads)
    gradients, grad = _inputs(of_map[0], of_map[1], of_mixing, of_output), grad.contiguous()
    work = library.function(f"instance_transformer_backward_{_TYPES[features.dtype]}")
    library.parallel_for(lambda first, end: work(inputs, grad, gradients, groups, sizes, first, end), groups)
    of_features, of_values = of_map.sum(1)
    return of_features.clone(), of_values.clone(), of_mixing, of_output


@fused_backward.register_fake
def _(grad, features, values, rows, columns, row_in, column_in, mixing, output, heads) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(features), torch.empty_like(values), torch.empty_like(mixing), torch.empty_like(output)


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.heads = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad: Tensor):
    of_features, of_values, of_mixing, of_output = fused_backward(grad, *ctx.saved_tensors, ctx.heads)
    return of_features, of_values, None, None, None, None, of_mixing, of_output, None


fused.register_autograd(_differentiate, setup_context=_keep)


class _Sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ssize_t) for name in ("instances", "height", "width", "channels", "heads", "points")]


def _sizes(features: Tensor, mixing: Tensor, heads: int) -> Any:
    return ctypes.byref(_Sizes(len(mixing), *features.shape, heads, mixing.shape[3] // heads))


def _inputs(*tensors: Tensor) -> Any:
    """Return a C structure of the tensors' addresses."""
    return (ctypes.c_void_p * len(tensors))(*(library.address(tensor) for tensor in tensors))
