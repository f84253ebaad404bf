"""Small parts that all systems share: perceptrons, clones of modules, sine position encoding and activation checkpointing."""

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Mlp(nn.Module):
    """Linear layers with ReLU between them.

    Args:
        widths: of the input, each hidden layer and the output.
    """

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., last width] for [..., first width]."""
        for layer in self.layers[:-1]:
            x = layer(x).relu_()
        return self.layers[-1](x)

    @property
    def last(self) -> nn.Linear:
        """The output layer, which some papers initialize in their own way."""
        return self.layers[-1]  # type: ignore[return-value]


def clones(module: nn.Module, count: int) -> nn.ModuleList:
    """Return `count` copies of a module with the same initial values, such as a head for every decoder layer."""
    return nn.ModuleList(copy.deepcopy(module) for _ in range(count))


def frequencies(position: Float[Tensor, "*n"], channels: int, temperature: float = 10000.0) -> Float[Tensor, "*n channels"]:
    """Return sine (even channels) and cosine (odd channels) of a position in radians at `channels` / 2 wavelengths."""
    pair = torch.arange(channels, device=position.device).div(2, rounding_mode="floor")
    angle = position[..., None] / temperature ** (2 * pair / channels)
    return torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1).flatten(-2)


def sine_positions(padding: Bool[Tensor, "B h w"], channels: int) -> Float[Tensor, "B h*w channels"]:
    """Return the encoding of each cell's position in the valid part of its map, y in the first half of the channels, then x.

    The position is the center of the cell (Deformable DETR subtracts 0.5, DETR does not) as a fraction of the valid height and
    width, times 2 pi (DETR, appendix A.4).
    """
    encoded = [frequencies(fraction * (2 * math.pi), channels // 2) for fraction in valid_fractions(padding, 0.5)]
    return torch.cat(encoded, dim=-1).flatten(1, 2)


def valid_fractions(padding: Bool[Tensor, "B h w"], offset: float) -> tuple[Float[Tensor, "B h w"], Float[Tensor, "B h w"]]:
    """Return y and x of each cell as fractions of the valid height and width: of its lower right corner less `offset` cells."""
    y, x = (~padding).cumsum(1, dtype=torch.float32), (~padding).cumsum(2, dtype=torch.float32)
    return (y - offset) / (y[:, -1:] + 1e-6), (x - offset) / (x[:, :, -1:] + 1e-6)


def cell_grid(height: int, width: int, like: Tensor) -> Float[Tensor, "cells 2"]:
    """Return x and y of the center of every cell of a map, row by row, in cells: 0.5, 1.5, ..."""
    y = torch.arange(height, dtype=like.dtype, device=like.device) + 0.5
    x = torch.arange(width, dtype=like.dtype, device=like.device) + 0.5
    return torch.stack([x.repeat(height), y.repeat_interleave(width)], -1)


class Layer(nn.Module):
    """A layer with optional activation checkpointing (Chen et al., 2016): it recomputes its activations in the backward pass.

    It must not contain batch norm, whose statistics would count a batch twice.

    Attributes:
        recomputes: whether training saves only the inputs for the backward pass. Gradients are equal bit for bit: dropout
            repeats its random numbers. `recompute` sets it.
    """

    recomputes = False

    def __call__(self, *inputs: Any) -> Any:
        """Return what `forward` returns."""
        return self.run(super().__call__, *inputs)

    def run(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Return `function(*inputs)`, which computes this layer, checkpointed where the layer recomputes."""
        if self.recomputes and self.training and torch.is_grad_enabled():
            return checkpoint(function, *inputs, use_reentrant=False)
        return function(*inputs)


def recompute(model: nn.Module) -> None:
    """Make every `Layer` of the model recompute its activations in training, which takes less memory and more time."""
    for module in model.modules():
        if isinstance(module, Layer):
            module.recomputes = True
