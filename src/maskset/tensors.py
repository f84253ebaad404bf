"""Records of tensors: moving them to a device, and telling PyTorch how to take them apart."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Device = torch.device | str
Same = TypeVar("Same", bound="TensorRecord")  # not typing.Self: the shape checker of the tests does not know it in methods


class TensorRecord:
    """`.to` and `.pin_memory` for a dataclass of tensors, and of lists of such dataclasses."""

    def to(self: Same, device: Device, non_blocking: bool = False) -> Same:
        """Return a copy on the device."""
        return self._each(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self: Same) -> Same:
        """Return a copy in page-locked memory, from which copies to a GPU need not wait."""
        return self._each(lambda value: value.pin_memory())

    def _each(self: Same, change) -> Same:
        def walk(value):
            if isinstance(value, list):
                return [walk(one) for one in value]
            return change(value) if isinstance(value, (Tensor, TensorRecord)) else value

        return type(self)(**{field.name: walk(getattr(self, field.name)) for field in fields(self)})  # type: ignore[arg-type]


def register(cls: type, names: Sequence[str]) -> None:
    pytree.register_pytree_node(
        cls,
        lambda value: ([getattr(value, name) for name in names], [(k, v) for k, v in vars(value).items() if k not in names]),
        lambda children, rest: _rebuild(cls, dict(zip(names, children, strict=True)) | dict(rest)),  # type: ignore[arg-type]
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
    )


def _rebuild(cls: type, values: dict[str, Any]) -> Any:
    made = object.__new__(cls)
    for name, value in values.items():
        object.__setattr__(made, name, value)
    return made
