"""Compute the systems on another device while a test sees CPU tensors only."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskset import detection
from maskset.detection import Matches
from maskset.instances import Instances
from maskset.systems import System
from maskset.tensors import TensorRecord


def moved(value: Any, device: str) -> Any:
    """Return a value with all tensors in it on a device; gradients flow back."""
    if isinstance(value, (Tensor, TensorRecord, Instances)):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(part, device) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(moved(part, device) for part in value)
    return value


class _Method(nn.Module):
    """A method of a system as a module, for `torch.func.functional_call`."""

    def __init__(self, system: System, method: Callable[..., Any]) -> None:
        super().__init__()
        self.system, self.method = system, method

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self.method(self.system, *arguments, **named)


def _computed_on(device: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(system: System, *arguments: Any, **named: Any) -> Any:
        state = {f"system.{name}": t.to(device) for name, t in chain(system.named_parameters(), system.named_buffers())}
        module = _Method(system, method)
        return moved(torch.func.functional_call(module, state, moved(arguments, device), moved(named, device)), "cpu")

    return call


def _seen_on_cpu(register: Callable[..., Any]) -> Callable[..., Any]:
    def call(module: nn.Module, hook: Callable[..., Any]) -> Any:
        return register(module, lambda module, *values: hook(module, *(moved(value, "cpu") for value in values)))

    return call


@contextmanager
def systems_on(device: str) -> Iterator[None]:
    """Let forward, loss and post-processing of every system compute on a device; parameters, gradients and results stay here."""
    with pytest.MonkeyPatch.context() as patch:
        for system in System.__subclasses__():
            for name in ("forward", "loss", "postprocess"):
                patch.setattr(system, name, _computed_on(device, getattr(system, name)))
        for name in ("register_forward_hook", "register_forward_pre_hook"):
            patch.setattr(nn.Module, name, _seen_on_cpu(getattr(nn.Module, name)))
        yield


def recording(matches: list[Matches]) -> Callable[..., Matches]:
    """Return `maskset.detection.match`, which also appends what it returns to a list, on the CPU."""
    match = detection.match  # before a test replaces it

    def record(*arguments: Any) -> Matches:
        result = match(*arguments)
        pairs = (getattr(result, name).cpu() for name in ("layer", "image", "slot", "object"))
        matches.append(Matches(*pairs, counts=result.counts))
        return result

    return record
