"""The PCA codec (SOLQ, section 3.2, equation 4): coordinates of a mask in the principal components of all masks."""

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from maskset.errors import ConfigError
from maskset.masks.codecs.fittable import MAX_MASKS, FittableCodec

EXACT_UP_TO = 48 * 48  # pixels of a mask up to which the whole S*S x S*S matrix is accumulated; its cost grows with S^6
BATCH = 1024  # masks processed at a time


class PcaCodec(FittableCodec):
    """Turns box-local masks into principal components, v = m P, and back, m = v P^T.

    The columns of P are the first right singular vectors of all masks, one per row. As in equation 4, no mean is subtracted.

    Args:
        size: side S of the mask, pixels.
        length: D, number of components.

    Raises:
        ConfigError: `length` is not in [1, size * size].
    """

    kind = "pca"
    basis: Float[Tensor, "P D"]

    def __init__(self, size: int = 28, length: int = 60) -> None:
        super().__init__(size, length)
        if size < 1 or not 1 <= length <= size * size:
            raise ConfigError(f"a PCA codec of {size} x {size} masks can have a length of 1 to {size * size}, got {length}.")
        self.register_buffer("basis", torch.zeros(size * size, length))

    def fit(self, masks: Tensor | Iterable[Tensor], max_masks: int = MAX_MASKS) -> None:
        """Fit the components to masks [n S S] in [0, 1], in one tensor or in batches, which are read once.

        Only the first `max_masks` are used; the batch sizes do not matter. Exact up to a size of 48; for larger masks the
        components come from a low-rank sketch of the masks read so far.

        Raises:
            ConfigError: there are fewer masks than components.
        """
        fit = _components if self.size**2 <= EXACT_UP_TO else _sketched_components
        count, components = fit(self.rows(masks, BATCH, max_masks), self.size**2, self.length)
        self.require_enough(count, self.length)
        # The sign of a singular vector is arbitrary; this choice is the same on every machine.
        largest = components.gather(0, components.abs().argmax(0, keepdim=True))
        self.basis.copy_(components * largest.sign())
        self.mark_fitted()

    def encode(self, masks: Float[Tensor, "n S S"]) -> Float[Tensor, "n D"]:
        """Return v = m P for masks with values in [0, 1].

        Raises:
            ConfigError: the codec has not been fitted.
        """
        self.require_fitted()
        return masks.flatten(1) @ self.basis

    def decode(self, codes: Float[Tensor, "n D"]) -> Float[Tensor, "n S S"]:
        """Return m = v P^T; the caller chooses the threshold.

        Raises:
            ConfigError: the codec has not been fitted.
        """
        self.require_fitted()
        return (codes @ self.basis.T).unflatten(1, (self.size, self.size))


def _components(batches: Iterator[Tensor], pixels: int, length: int) -> tuple[int, Tensor]:
    """Return the number of masks and their first right singular vectors [P D]: eigenvectors of M^T M."""
    count, gram = 0, torch.zeros(pixels, pixels, dtype=torch.float64)
    for batch in batches:
        count += len(batch)
        gram.addmm_(batch.T.double(), batch.double())
    return count, torch.linalg.eigh(gram).eigenvectors[:, -length:].flip(1)


def _sketched_components(batches: Iterator[Tensor], pixels: int, length: int) -> tuple[int, Tensor]:
    """Return an approximation: the masks read so far are replaced by their first 2 * length singular vectors, scaled."""
    count, rank = 0, 2 * length
    sketch = torch.zeros(0, pixels)
    for batch in batches:
        count += len(batch)
        sketch = torch.cat([sketch, batch.float()])
        vectors = torch.linalg.eigh((sketch @ sketch.T).double()).eigenvectors  # rows x rows: far fewer than pixels x pixels
        sketch = vectors[:, -rank:].flip(1).T.float() @ sketch
    return count, nn.functional.normalize(sketch[:length].T, dim=0)
