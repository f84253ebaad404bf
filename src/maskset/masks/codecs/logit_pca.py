"""The code of ISTR: principal components of a mask's logits, whitened (section 3.1; the paper leaves out all but equation 3).

The paper's equation 3 is plain PCA. The official code, like MEInst's (Zhang et al., CVPR 2020), replaces each pixel by the logit
of a soft value, subtracts the mean, and divides each number by its standard deviation; the decoder ends with a sigmoid.
"""

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from maskset.errors import ConfigError
from maskset.masks.codecs.files import GREATEST, MOST_MASKS, require_enough, require_fitted, rows
from maskset.masks.codecs.pca import BATCH, EXACT_UP_TO

GREATEST_SOFTNESS, LEAST_SOFTNESS = 0.05, 0.01  # a pixel becomes 1 - e or e, with e drawn from 0 ... 0.05, at least 0.01


class LogitPcaCodec(nn.Module):
    """Turns box-local masks into whitened principal components of their logits, and back into probabilities.

    Args:
        size: side S of the mask, pixels.
        length: D, how many components to keep.

    Raises:
        ConfigError: `size` is not in [1, 1024], or `length` not in [1, size * size].
    """

    components: Float[Tensor, "D P"]
    explained_variances: Float[Tensor, "D"]
    means: Float[Tensor, "P"]
    fitted: Bool[Tensor, ""]

    def __init__(self, size: int = 28, length: int = 60) -> None:
        super().__init__()
        if not 1 <= size <= GREATEST:
            raise ConfigError(f"masks that are coded can have a size of 1 to {GREATEST}, got {size}.")
        if not 1 <= length <= size * size:
            raise ConfigError(f"a PCA code of {size} x {size} masks can have a length of 1 to {size * size}, got {length}.")
        self.size, self.length = size, length
        self.register_buffer("components", torch.zeros(length, size * size))
        self.register_buffer("explained_variances", torch.ones(length))
        self.register_buffer("means", torch.zeros(size * size))
        self.register_buffer("fitted", torch.tensor(False))

    def fit(self, masks: Tensor | Iterable[Tensor], most_masks: int = MOST_MASKS, seed: int = 0) -> None:
        """Learn mean and components from masks [n S S] in [0, 1], given whole or in batches, which are read once.

        The softness of every pixel is drawn anew, as officially, but from a seed. Only the first `most_masks` count; how they are
        batched does not matter. Exact up to a size of 48; beyond, what was read is kept as a sketch.

        Raises:
            ConfigError: there are not more masks than components.
        """
        generator = torch.Generator().manual_seed(seed)
        drawn = (_logits(part, torch.rand(part.shape, generator=generator)) for part in rows(masks, BATCH, most_masks))
        learn = _components if self.size**2 <= EXACT_UP_TO else _sketched_components
        found, means, components, variances = learn(drawn, self.size**2, self.length)
        require_enough(self, found, self.length + 1)  # the mean takes one
        # The sign of a component is arbitrary; this one is the same on every machine.
        largest = components.gather(1, components.abs().argmax(1, keepdim=True))
        self.components.copy_(components * largest.sign())
        self.explained_variances.copy_(variances.clamp(min=1e-6))  # fewer different masks than components: some never vary
        self.means.copy_(means)
        self.fitted.fill_(True)

    def encode(self, masks: Float[Tensor, "n S S"], noisy: bool = False) -> Float[Tensor, "n D"]:
        """Return whitened components of masks with values in [0, 1].

        Args:
            masks: to encode.
            noisy: draw the softness of every pixel, as officially at every call; else the middle of its range, 0.025.

        Raises:
            ConfigError: `fit` has not been called, nor fitted weights loaded.
        """
        require_fitted(self)
        flat = masks.flatten(1)
        logits = _logits(flat, torch.rand_like(flat) if noisy else torch.full_like(flat, 0.5))
        return (logits - self.means) @ self.components.T / self.explained_variances.sqrt()

    def decode(self, codes: Float[Tensor, "n D"]) -> Float[Tensor, "n S S"]:
        """Return the probability of every pixel; 0.5 is the threshold.

        Raises:
            ConfigError: `fit` has not been called, nor fitted weights loaded.
        """
        require_fitted(self)
        logits = (codes * self.explained_variances.sqrt()) @ self.components + self.means
        return logits.sigmoid().unflatten(1, (self.size, self.size))


def _logits(masks: Tensor, draw: Tensor) -> Tensor:
    """Return the logits that stand for pixels, given one number in [0, 1) for each."""
    softness = (GREATEST_SOFTNESS * draw).clamp(min=LEAST_SOFTNESS)
    soft = torch.where(masks > softness, 1 - softness, softness)
    return (soft / (1 - soft)).log()


def _components(batches: Iterator[Tensor], pixels: int, length: int) -> tuple[int, Tensor, Tensor, Tensor]:
    """Return how many rows there were, their mean [P], principal components [D P] and the variances along those [D]."""
    found, total, gram = 0, torch.zeros(pixels, dtype=torch.float64), torch.zeros(pixels, pixels, dtype=torch.float64)
    for batch in batches:
        found += len(batch)
        total += batch.double().sum(0)
        gram.addmm_(batch.T.double(), batch.double())
    means = total / max(1, found)
    covariance = (gram - found * torch.outer(means, means)) / max(1, found - 1)
    variances, vectors = torch.linalg.eigh(covariance)
    return found, means, vectors[:, -length:].flip(1).T, variances[-length:].flip(0)


def _sketched_components(batches: Iterator[Tensor], pixels: int, length: int) -> tuple[int, Tensor, Tensor, Tensor]:
    """Return the same, nearly: rows read so far are replaced by their first components, scaled (Ross et al., IJCV 2008)."""
    found, kept, means = 0, 2 * length, torch.zeros(pixels)
    sketch = torch.zeros(0, pixels)
    for batch in batches:
        own, count = batch.mean(0), found + len(batch)
        between = (found * len(batch) / count) ** 0.5 * (means - own)  # what the means of old and new rows differ by
        means = (found * means + len(batch) * own) / count
        found, sketch = count, torch.cat([sketch, batch - own, between[None]])
        vectors = torch.linalg.eigh((sketch @ sketch.T).double()).eigenvectors  # rows x rows: far fewer than pixels x pixels
        sketch = vectors[:, -kept:].flip(1).T.float() @ sketch
    norms = sketch[:length].norm(dim=1)
    return found, means, sketch[:length] / norms.clamp(min=1e-12)[:, None], norms.square() / max(1, found - 1)
