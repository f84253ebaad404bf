"""The codec of ISTR: whitened principal components of the logits of a mask (section 3.1, which gives only equation 3).

The paper's equation 3 is plain PCA. The official code, like MEInst's (Zhang et al., CVPR 2020), replaces each pixel by the logit
of a soft value, subtracts the mean, and divides each number by its standard deviation; the decoder ends with a sigmoid.
"""

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from maskset.errors import ConfigError
from maskset.masks.codecs.fittable import MAX_MASKS, MAX_SIZE, FittableCodec
from maskset.masks.codecs.pca import BATCH, EXACT_UP_TO

GREATEST_SOFTNESS, LEAST_SOFTNESS = 0.05, 0.01  # a pixel becomes 1 - e or e, with e drawn from 0 ... 0.05, at least 0.01


class LogitPcaCodec(FittableCodec):
    """Turns box-local masks into whitened principal components of their logits, and back into probabilities.

    Args:
        size: side S of the mask, pixels.
        length: D, number of components.

    Raises:
        ConfigError: `size` is not in [1, 1024], or `length` not in [1, size * size].
    """

    kind = "logit-pca"
    components: Float[Tensor, "D P"]
    explained_variances: Float[Tensor, "D"]
    means: Float[Tensor, "P"]

    def __init__(self, size: int = 28, length: int = 60) -> None:
        super().__init__(size, length)
        if not 1 <= size <= MAX_SIZE:
            raise ConfigError(f"a logit-PCA codec can have a size of 1 to {MAX_SIZE}, got {size}.")
        if not 1 <= length <= size * size:
            raise ConfigError(f"a PCA code of {size} x {size} masks can have a length of 1 to {size * size}, got {length}.")
        self.register_buffer("components", torch.zeros(length, size * size))
        self.register_buffer("explained_variances", torch.ones(length))
        self.register_buffer("means", torch.zeros(size * size))

    def fit(self, masks: Tensor | Iterable[Tensor], max_masks: int = MAX_MASKS, seed: int = 0) -> None:
        """Fit mean and components to masks [n S S] in [0, 1], in one tensor or in batches, which are read once.

        The softness of every pixel is drawn anew, as officially, but from a seed. Only the first `max_masks` are used; the batch
        sizes do not matter. Exact up to a size of 48; for larger masks the components come from a low-rank sketch.

        Raises:
            ConfigError: there are not more masks than components.
        """
        generator = torch.Generator().manual_seed(seed)
        logits = (_logits(part, torch.rand(part.shape, generator=generator)) for part in self.rows(masks, BATCH, max_masks))
        fit = _components if self.size**2 <= EXACT_UP_TO else _sketched_components
        count, means, components, variances = fit(logits, self.size**2, self.length)
        self.require_enough(count, self.length + 1)  # one more for the mean
        # The sign of a component is arbitrary; this choice is the same on every machine.
        largest = components.gather(1, components.abs().argmax(1, keepdim=True))
        self.components.copy_(components * largest.sign())
        self.explained_variances.copy_(variances.clamp(min=1e-6))  # zero if there are fewer different masks than components
        self.means.copy_(means)
        self.mark_fitted()

    def encode(self, masks: Float[Tensor, "n S S"], noisy: bool = False) -> Float[Tensor, "n D"]:
        """Return whitened components of masks with values in [0, 1].

        Args:
            masks: to encode.
            noisy: draw the softness of every pixel, as the official code does at every call; otherwise use the middle, 0.025.

        Raises:
            ConfigError: the codec has not been fitted.
        """
        self.require_fitted()
        flat = masks.flatten(1)
        logits = _logits(flat, torch.rand_like(flat) if noisy else torch.full_like(flat, 0.5))
        return (logits - self.means) @ self.components.T / self.explained_variances.sqrt()

    def decode(self, codes: Float[Tensor, "n D"]) -> Float[Tensor, "n S S"]:
        """Return the probability of every pixel; 0.5 is the threshold.

        Raises:
            ConfigError: the codec has not been fitted.
        """
        self.require_fitted()
        logits = (codes * self.explained_variances.sqrt()) @ self.components + self.means
        return logits.sigmoid().unflatten(1, (self.size, self.size))


def _logits(masks: Tensor, draw: Tensor) -> Tensor:
    """Return the logits that stand for pixels, given one number in [0, 1) for each."""
    softness = (GREATEST_SOFTNESS * draw).clamp(min=LEAST_SOFTNESS)
    soft = torch.where(masks > softness, 1 - softness, softness)
    return (soft / (1 - soft)).log()


def _components(batches: Iterator[Tensor], pixels: int, length: int) -> tuple[int, Tensor, Tensor, Tensor]:
    """Return the number of rows, their mean [P], principal components [D P] and the variances along those [D]."""
    count, total, gram = 0, torch.zeros(pixels, dtype=torch.float64), torch.zeros(pixels, pixels, dtype=torch.float64)
    for batch in batches:
        count += len(batch)
        total += batch.double().sum(0)
        gram.addmm_(batch.T.double(), batch.double())
    means = total / max(1, count)
    covariance = (gram - count * torch.outer(means, means)) / max(1, count - 1)
    variances, vectors = torch.linalg.eigh(covariance)
    return count, means, vectors[:, -length:].flip(1).T, variances[-length:].flip(0)


def _sketched_components(batches: Iterator[Tensor], pixels: int, length: int) -> tuple[int, Tensor, Tensor, Tensor]:
    """Return an approximation: rows read so far are replaced by their first components, scaled (Ross et al., IJCV 2008)."""
    total, rank, means = 0, 2 * length, torch.zeros(pixels)
    sketch = torch.zeros(0, pixels)
    for batch in batches:
        batch_mean, count = batch.mean(0), total + len(batch)
        between = (total * len(batch) / count) ** 0.5 * (means - batch_mean)  # variation between the old and the new rows
        means = (total * means + len(batch) * batch_mean) / count
        total, sketch = count, torch.cat([sketch, batch - batch_mean, between[None]])
        vectors = torch.linalg.eigh((sketch @ sketch.T).double()).eigenvectors  # rows x rows: far fewer than pixels x pixels
        sketch = vectors[:, -rank:].flip(1).T.float() @ sketch
    norms = sketch[:length].norm(dim=1)
    return total, means, sketch[:length] / norms.clamp(min=1e-12)[:, None], norms.square() / max(1, total - 1)
