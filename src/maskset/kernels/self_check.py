"""The Triton kernels of deformable attention compared with their plain version on a tiny input, once per process and device.

Compilers and GPUs differ, and wrong gradients are silent. Where the kernels do not compile or do not agree, they are not used.
"""

import importlib
import warnings
from functools import cache

import torch
from torch import Tensor

from maskset.kernels.attention_plain import by_grid_sample

_SHAPES = [(5, 7), (3, 2)]
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}  # relative to the greatest number


@torch.compiler.assume_constant_result
def triton_failure(device: torch.device) -> str | None:
    """Return why the Triton kernels are not used on a device, or None if they work there. The first failure is also a warning."""
    return _failure(device.type, device.index, torch.are_deterministic_algorithms_enabled())


@cache
def _failure(device_type: str, index: int | None, deterministic: bool) -> str | None:  # sums differ in deterministic mode
    device = torch.device(device_type) if index is None else torch.device(device_type, index)
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        reason = next(filter(None, (_disagreement(dtype, device) for dtype in _TOLERANCES)), None)
    if reason is not None:
        advice = "The slower plain path is used. Please report this with the output of `maskset info`."
        warnings.warn(f"the Triton kernels do not work on {device}: {reason}. {advice}", RuntimeWarning, stacklevel=3)
    return reason


def _disagreement(dtype: torch.dtype, device: torch.device) -> str | None:
    """Return what is wrong in one type; None if the output and all gradients agree with those of float64 on the CPU."""
    grad, value, locations, weights = _example(dtype)
    inputs = [tensor.double().requires_grad_() for tensor in (value, locations, weights)]
    output = by_grid_sample(inputs[0], _SHAPES, inputs[1], inputs[2])
    expected = output, *torch.autograd.grad(output, inputs, grad.double())
    grad, value, locations, weights = (tensor.to(device) for tensor in (grad, value, locations, weights))
    try:
        kernels = importlib.import_module("maskset.kernels.attention_triton")
        results = kernels.forward(value, _SHAPES, locations, weights), *kernels.backward(grad, value, _SHAPES, locations, weights)
        results = [result.double().cpu() for result in results]
    except torch.OutOfMemoryError:
        raise  # says nothing about the kernels
    except Exception as error:  # whatever a compiler or a driver raises
        return f"{type(error).__name__} in {dtype}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    names = "the output", "the gradient of value", "the gradient of locations", "the gradient of weights"
    for name, result, reference in zip(names, results, expected, strict=True):
        if not bool((result - reference).abs().max() <= _TOLERANCES[dtype] * reference.abs().max()):  # also where it is NaN
            return f"{name} is wrong in {dtype}"
    return None


def _example(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return grad, value, locations and weights. No location is near the center of a cell, where the gradient jumps."""
    generator = torch.Generator("cpu").manual_seed(0)
    options = {"generator": generator, "dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are
    batch, queries, heads, points, width = 2, 9, 2, 2, 8
    samples = batch, queries, heads, len(_SHAPES), points
    sizes = torch.tensor([(w, h) for h, w in _SHAPES], device="cpu")[:, None]
    cells = (torch.rand(*samples, 2, **options) * (sizes + 3) - 2).floor()
    locations = (cells + 0.6 + 0.8 * torch.rand(*samples, 2, **options)) / sizes
    value = torch.randn(batch, sum(h * w for h, w in _SHAPES), heads, width, **options).to(dtype)
    grad = torch.randn(batch, queries, heads * width, **options).to(dtype)
    return grad, value, locations, torch.rand(*samples, **options)
