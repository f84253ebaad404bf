"""The flatten codec (SOLQ, Table 3a): the pixels of a small mask, row by row. It has no parameters to fit."""

from jaxtyping import Float
from torch import Tensor, nn

from maskset.errors import ConfigError


class FlattenCodec(nn.Module):
    """Turns box-local masks into their own pixels and back.

    Args:
        size: side S of the mask, pixels; the length D of the code is S * S.

    Raises:
        ConfigError: `size` is not positive.
    """

    def __init__(self, size: int = 28) -> None:
        super().__init__()
        if size < 1:
            raise ConfigError(f"the side of a mask must be at least 1 pixel, got {size}.")
        self.size, self.length = size, size * size

    def encode(self, masks: Float[Tensor, "n S S"]) -> Float[Tensor, "n D"]:
        """Return the pixels of each mask as one row of numbers."""
        return masks.flatten(1)

    def decode(self, codes: Float[Tensor, "n D"]) -> Float[Tensor, "n S S"]:
        """Return the numbers as pixels; the caller chooses the threshold."""
        return codes.unflatten(1, (self.size, self.size))
