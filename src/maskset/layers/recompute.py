"""Activation checkpointing (Chen et al., 2016): layers that forget what they computed, and compute it again for the gradient."""

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Layer(nn.Module):
    """A layer of a stack whose inner tensors would fill the memory; batch norms, which must see a batch once, are in none.

    Attributes:
        recomputes: in training, keep only inputs between forward and backward. Gradients stay the same bit for bit: dropout
            repeats its draws. `recompute` sets it.
    """

    recomputes = False

    def __call__(self, *inputs: Any) -> Any:
        """Return what `forward` returns."""
        if self.recomputes and self.training and torch.is_grad_enabled():
            return checkpoint(super().__call__, *inputs, use_reentrant=False)
        return super().__call__(*inputs)


def recompute(model: nn.Module) -> None:
    """Let all layers in the model that can do so trade time for memory while it is trained."""
    for module in model.modules():
        if isinstance(module, Layer):
            module.recomputes = True
