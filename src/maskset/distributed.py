"""Helpers for training in several processes; in a single process they have no effect."""

import os

import torch
from torch import Tensor
from torch import distributed as dist

from maskset.errors import ConfigError


def launched(variable: str, default: int) -> int:
    """Return the number in an environment variable that a launcher of processes sets, such as RANK or WORLD_SIZE.

    A negative number means "not set", as in accelerate.

    Raises:
        ConfigError: it is not a whole number.
    """
    text = os.environ.get(variable, "")
    if text and not text.removeprefix("-").isdecimal():
        raise ConfigError(f"the environment variable {variable} must be a whole number, got {text!r}: unset or correct it.")
    return int(text) if text and int(text) >= 0 else default


def active() -> bool:
    """Return whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if active() else 1


def divisor(count: float | Tensor, like: Tensor) -> Tensor:
    """Return what a sum over this process's objects is divided by: max(total over processes, 1) / processes.

    With gradients averaged over processes, N processes then equal one process with the same global batch.

    Args:
        count: number of objects or pairs in this process.
        like: a tensor whose device and type (float) the result takes.
    """
    total = torch.as_tensor(count, dtype=torch.float32, device=like.device).clone()
    if active():
        dist.all_reduce(total)
    return total.clamp(min=1) / world_size()
