"""What codecs with numbers of their own have in common: they stay in float32 in a model of any other type."""

from collections.abc import Callable

from torch import Tensor, nn


class Float32Module(nn.Module):
    """A module that `half()`, `bfloat16()`, `double()` and `to(dtype)` leave in float32; it still moves to other devices.

    Systems decode codes in float32 whatever their own type, because rounding would move the edges of masks.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)
