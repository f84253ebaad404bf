"""Mask codecs: D numbers per box-local mask. `dct` and `flatten` are fixed, the others are fitted to masks (`fittable`)."""

from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor


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
