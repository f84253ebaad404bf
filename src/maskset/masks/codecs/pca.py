"""The PCA codec (SOLQ, section 3.2, equation 4), and principal components, which ISTR's codec also uses."""

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from maskset.errors import ConfigError
from maskset.masks.codecs.fittable import MAX_MASKS, MAX_SIZE, FittableCodec

EXACT_UP_TO = 48 * 48  # pixels of a mask up to which the whole S*S x S*S matrix is accumulated; its cost grows with S^6
BATCH = 1024  # masks processed at a time


class PcaCodec(FittableCodec):
    """Turns box-local masks into principal components, v = m P, and back, m = v P^T.

    The columns of P are the first right singular vectors of all masks, one per row. As in equation 4, no mean is subtracted.

    Args:
        size: side S of the mask, pixels.
        length: D, number of components.

    Raises:
        ConfigError: `size` is not in [1, 1024], or `length` not in [1, size * size].
    """

    kind = "pca"
    basis: Float[Tensor, "P D"]

    def __init__(self, size: int = 28, length: int = 60) -> None:
        check_size_and_length("PCA", size, length)
        super().__init__(size, length)
        self.register_buffer("basis", torch.zeros(size * size, length))

    def fit(self, masks: Tensor | Iterable[Tensor], max_masks: int = MAX_MASKS) -> None:
        """Fit the components to masks [n S S] in [0, 1], in one tensor or in batches, which are read once.

        Only the first `max_masks` are used; the batch sizes do not matter. Exact up to a size of 48; for larger masks the
        components come from a low-rank sketch of the masks read so far.

        Raises:
            ConfigError: there are fewer masks than components.
        """
        rows = self.rows(masks, BATCH, max_masks)
        count, _, components, _ = principal_components(rows, self.size**2, self.length, centered=False)
        self.require_enough(count, self.length)
        self.basis.copy_(components.T)
        self.mark_fitted()

    def _encode(self, masks: Tensor) -> Tensor:
        return masks.flatten(1) @ self.basis

    def _decode(self, codes: Tensor) -> Tensor:
        return (codes @ self.basis.T).unflatten(1, (self.size, self.size))


def check_size_and_length(kind: str, size: int, length: int) -> None:
    """Check that a codec of this kind can have a size of the masks and a number of principal components.

    Raises:
        ConfigError: they cannot.
    """
    if not 1 <= size <= MAX_SIZE:
        raise ConfigError(f"a {kind} codec can have a size of 1 to {MAX_SIZE}, got {size}.")
    if not 1 <= length <= size * size:
        raise ConfigError(f"a {kind} codec of {size} x {size} masks can have a length of 1 to {size * size}, got {length}.")


def principal_components(
    batches: Iterator[Tensor], pixels: int, length: int, centered: bool
) -> tuple[int, Float[Tensor, "P"], Float[Tensor, "D P"], Float[Tensor, "D"]]:
    """Return the number of rows, their mean, their first principal components and the variances along these.

    Args:
        batches: rows [n P], read once.
        pixels: P.
        length: D, number of components.
        centered: whether to subtract the mean, which is zero otherwise.
    """
    fit = _exact_components if pixels <= EXACT_UP_TO else _sketched_components
    count, means, components, variances = fit(batches, pixels, length, centered)
    # The sign of a component is arbitrary; this choice is the same on every machine.
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    return count, means, components * largest.sign(), variances


def _exact_components(batches: Iterator[Tensor], pixels: int, length: int, centered: bool) -> tuple[int, Tensor, Tensor, Tensor]:
    """Return the components as eigenvectors of the covariance matrix."""
    count, total, gram = 0, torch.zeros(pixels, dtype=torch.float64), torch.zeros(pixels, pixels, dtype=torch.float64)
    for batch in batches:
        count += len(batch)
        total += batch.double().sum(0)
        gram.addmm_(batch.T.double(), batch.double())
    means = total / max(1, count) if centered else torch.zeros_like(total)
    covariance = (gram - count * torch.outer(means, means)) / max(1, count - 1)
    variances, vectors = torch.linalg.eigh(covariance)
    return count, means, vectors[:, -length:].flip(1).T, variances[-length:].flip(0)


def _sketched_components(
    batches: Iterator[Tensor], pixels: int, length: int, centered: bool
) -> tuple[int, Tensor, Tensor, Tensor]:
    """Return an approximation: the rows read so far are replaced by 2 D scaled components of them (Ross et al., IJCV 2008)."""
    count, means, sketch = 0, torch.zeros(pixels), torch.zeros(0, pixels)
    for batch in batches:
        rows, before = batch.float(), count
        count += len(batch)
        if centered:
            batch_mean = rows.mean(0)
            between = (before * len(batch) / count) ** 0.5 * (means - batch_mean)  # variation between the old and the new rows
            means = (before * means + len(batch) * batch_mean) / count
            rows = torch.cat([rows - batch_mean, between[None]])
        sketch = torch.cat([sketch, rows])
        vectors = torch.linalg.eigh((sketch @ sketch.T).double()).eigenvectors  # rows x rows: far fewer than pixels x pixels
        sketch = vectors[:, -2 * length :].flip(1).T.float() @ sketch
    norms = sketch[:length].norm(dim=1)
    return count, means, sketch[:length] / norms.clamp(min=1e-12)[:, None], norms.square() / max(1, count - 1)
