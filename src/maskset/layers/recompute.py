"""Activation checkpointing (Chen et al., 2016): layers that recompute their activations in the backward pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Layer(nn.Module):
    """A layer that can be checkpointed. It contains no batch norm, which would see a batch twice.

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
    """Let every `Layer` of the model recompute its activations in training: less memory for more time."""
    for module in model.modules():
        if isinstance(module, Layer):
            module.recomputes = True
