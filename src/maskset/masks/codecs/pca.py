"""The principal component code (SOLQ, section 3.2, equation 4): a mask's coordinates in the subspace nearest to all masks."""

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from maskset.errors import ConfigError
from maskset.masks.codecs.files import MOST_MASKS, require_enough, require_fitted, rows

EXACT_UP_TO = 48 * 48  # pixels of a mask up to which the whole S*S x S*S matrix is accumulated; its cost grows with S^6
BATCH = 1024  # masks taken in at a time


class PcaCodec(nn.Module):
    """Turns box-local masks into principal components, v = m P, and back, m = v P^T.

    The columns of P are the first right singular vectors of all masks, one per row. As in equation 4, no mean is subtracted.

    Args:
        size: side S of the mask, pixels.
        length: D, how many components to keep.

    Raises:
        ConfigError: `length` is not in [1, size * size].
    """

    basis: Float[Tensor, "P D"]
    fitted: Bool[Tensor, ""]

    def __init__(self, size: int = 28, length: int = 60) -> None:
        super().__init__()
        if size < 1 or not 1 <= length <= size * size:
            raise ConfigError(f"a PCA code of {size} x {size} masks can have a length of 1 to {size * size}, got {length}.")
        self.size, self.length = size, length
        self.register_buffer("basis", torch.zeros(size * size, length))
        self.register_buffer("fitted", torch.tensor(False))

    def fit(self, masks: Tensor | Iterable[Tensor], most_masks: int = MOST_MASKS) -> None:
        """Learn the components from masks [n S S] in [0, 1], given whole or in batches, which are read once.

        Only the first `most_masks` count; how they are batched does not matter. Exact up to a size of 48; beyond, a sketch
        keeps what matters of what was read.

        Raises:
            ConfigError: there are fewer masks than components.
        """
        learn = _components if self.size**2 <= EXACT_UP_TO else _sketched_components
        found, components = learn(rows(masks, BATCH, most_masks), self.size**2, self.length)
        require_enough(self, found, self.length)
        # A singular vector's sign is arbitrary; this one is the same on every machine.
        largest = components.gather(0, components.abs().argmax(0, keepdim=True))
        self.basis.copy_(components * largest.sign())
        self.fitted.fill_(True)

    def encode(self, masks: Float[Tensor, "n S S"]) -> Float[Tensor, "n D"]:
        """Return v = m P for masks with values in [0, 1].

        Raises:
            ConfigError: `fit` has not been called, nor fitted weights loaded.
        """
        require_fitted(self)
        return masks.flatten(1) @ self.basis

    def decode(self, codes: Float[Tensor, "n D"]) -> Float[Tensor, "n S S"]:
        """Return m = v P^T; the caller chooses the threshold.

        Raises:
            ConfigError: `fit` has not been called, nor fitted weights loaded.
        """
        require_fitted(self)
        return (codes @ self.basis.T).unflatten(1, (self.size, self.size))


def _components(batches: Iterator[Tensor], pixels: int, length: int) -> tuple[int, Tensor]:
    """Return how many masks there were, and their first right singular vectors [P D]: eigenvectors of M^T M."""
    found, gram = 0, torch.zeros(pixels, pixels, dtype=torch.float64)
    for batch in batches:
        found += len(batch)
        gram.addmm_(batch.T.double(), batch.double())
    return found, torch.linalg.eigh(gram).eigenvectors[:, -length:].flip(1)


def _sketched_components(batches: Iterator[Tensor], pixels: int, length: int) -> tuple[int, Tensor]:
    """Return the same, nearly: the masks read so far are replaced by their `kept` first singular vectors, scaled."""
    found, kept = 0, 2 * length
    sketch = torch.zeros(0, pixels)
    for batch in batches:
        found += len(batch)
        sketch = torch.cat([sketch, batch.float()])
        vectors = torch.linalg.eigh((sketch @ sketch.T).double()).eigenvectors  # rows x rows: far fewer than pixels x pixels
        sketch = vectors[:, -kept:].flip(1).T.float() @ sketch
    return found, nn.functional.normalize(sketch[:length].T, dim=0)
