"""Mask codecs: D numbers per box-local mask. `dct` and `flatten` are fixed, the others are fitted to masks (`fittable`)."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn


@runtime_checkable
class MaskCodec(Protocol):
    """Turns box-local masks into numbers and back.

    Attributes:
        size: side S of the mask, pixels.
        length: D, how many numbers describe one mask.
    """

    size: int
    length: int

    def encode(self, masks: Float[Tensor, "n S S"]) -> Float[Tensor, "n D"]:
        """Return the codes of masks with values in [0, 1]."""
        ...

    def decode(self, codes: Float[Tensor, "n D"]) -> Float[Tensor, "n S S"]:
        """Return real-valued masks; the caller chooses the threshold."""
        ...


class Float32Module(nn.Module):
    """A module that stays in float32 after `half()`, `bfloat16()`, `double()` and `to(dtype)`; it moves to other devices.

    Systems decode codes in float32 whatever their own type, because rounding would move the edges of masks.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)
