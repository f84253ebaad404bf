"""Averaged weights: a copy of the model that follows it slowly, and is what gets evaluated and saved."""

import copy
from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def averaged_copy(model: Model) -> Model:
    """Return a copy of the model whose weights `average` will move; it is not trained itself."""
    return copy.deepcopy(model).requires_grad_(False).eval()


@torch.no_grad()
def average(averaged: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Move the averaged weights toward the model's: averaged = d * averaged + (1 - d) * weights, in place.

    Args:
        averaged: made by `averaged_copy`.
        model: what is trained.
        decay: d in the long run. At first it is (1 + step) / (10 + step), or the random start would stay in the average.
        step: optimizer steps done, at least 1.
    """
    share = 1 - min(decay, (1 + step) / (10 + step))
    for average_of, weight in zip(averaged.parameters(), model.parameters(), strict=True):
        average_of.lerp_(weight, share)
    for average_of, value in zip(averaged.buffers(), model.buffers(), strict=True):  # statistics of batch norms are means already
        average_of.copy_(value)
