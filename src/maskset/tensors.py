"""Dataclasses of tensors: moving them to a device, checking devices, and registration as pytrees."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from maskset.errors import ConfigError

Device = torch.device | str
Same = TypeVar("Same", bound="TensorRecord")  # not typing.Self: the shape checker of the tests does not know it in methods


def check_device(device: Device) -> torch.device:
    """Return the device.

    Raises:
        ConfigError: this machine cannot compute on it.
    """
    try:
        checked = torch.device(device)
        torch.zeros(1, device=checked).item()  # not on "meta", which computes nothing
    except (RuntimeError, AssertionError, TypeError) as error:
        usable = ["cpu"]
        if torch.accelerator.is_available():
            kind = torch.accelerator.current_accelerator()
            usable += [f"{kind}:{index}" for index in range(torch.accelerator.device_count())]
        reason = str(error).splitlines()[0].partition(". ")[0]  # torch's message for mps is a page long
        if isinstance(error, TypeError) or "Expected one of" in reason:
            reason = "it is not the name of a device"
        raise ConfigError(f"device {str(device)!r} cannot be used ({reason}). Available here: {', '.join(usable)}.") from None
    return checked


def _exists(device: Device) -> bool:
    """Return whether the machine has a device, whether or not computing on it works."""
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        return False
    gpu = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    is_gpu = gpu is not None and device.type == gpu.type and (device.index or 0) < torch.accelerator.device_count()
    return device.type in ("cpu", "meta") or is_gpu


class TensorRecord:
    """Base of dataclasses whose fields are tensors, other TensorRecords, or lists of them."""

    def to(self: Same, device: Device, non_blocking: bool = False) -> Same:
        """Return a copy on the device.

        Raises:
            ConfigError: this machine cannot compute on it.
        """
        try:
            return self._to(torch.device(device), non_blocking)
        except (RuntimeError, AssertionError, TypeError):
            if not _exists(device):
                check_device(device)  # raises an error that says which devices there are
            raise

    def _to(self: Same, device: torch.device, non_blocking: bool) -> Same:
        return self._each(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self: Same) -> Same:
        """Return a copy in page-locked memory, from which copies to a GPU need not wait."""
        return self._each(lambda value: value.pin_memory())

    def _each(self: Same, change) -> Same:
        def walk(value):
            if isinstance(value, list):
                return [walk(item) for item in value]
            return change(value) if isinstance(value, (Tensor, TensorRecord)) else value

        return type(self)(**{field.name: walk(getattr(self, field.name)) for field in fields(self)})  # type: ignore[arg-type]


def register(cls: type, names: Sequence[str]) -> None:
    """Register a class as a pytree whose children are the attributes `names`, for torch.compile and torch.export."""
    pytree.register_pytree_node(
        cls,
        lambda value: ([getattr(value, name) for name in names], [(k, v) for k, v in vars(value).items() if k not in names]),
        lambda children, rest: _rebuild(cls, dict(zip(names, children, strict=True)) | dict(rest)),  # type: ignore[arg-type]
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
    )


def _rebuild(cls: type, values: dict[str, Any]) -> Any:
    instance = object.__new__(cls)
    for name, value in values.items():
        object.__setattr__(instance, name, value)
    return instance
