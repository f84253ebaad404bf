"""The codec of ISTR: whitened principal components of the logits of a mask (section 3.1, which gives only equation 3).

The paper's equation 3 is plain PCA. The official code, like MEInst's (Zhang et al., CVPR 2020), replaces each pixel by the logit
of a soft value, subtracts the mean, and divides each number by its standard deviation; the decoder ends with a sigmoid.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from maskset.masks.codecs import pca
from maskset.masks.codecs.fittable import MAX_MASKS, FittableCodec

MAX_SOFTNESS, MIN_SOFTNESS = 0.05, 0.01  # a pixel becomes 1 - e or e, with e drawn from 0 ... 0.05, at least 0.01


class LogitPcaCodec(FittableCodec):
    """Turns box-local masks into whitened principal components of their logits, and back into probabilities (threshold 0.5).

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
        pca.check_size_and_length("logit-PCA", size, length)
        super().__init__(size, length)
        self.register_buffer("components", torch.zeros(length, size * size))
        self.register_buffer("explained_variances", torch.ones(length))
        self.register_buffer("means", torch.zeros(size * size))

    def fit(self, masks: Tensor | Iterable[Tensor], max_masks: int = MAX_MASKS, seed: int = 0) -> None:
        """Fit mean and components to masks [n S S] in [0, 1], in one tensor or in batches, which are read once.

        The softness of every pixel is random, as in the official code, but from a seed. Only the first `max_masks` are used; the
        batch sizes do not matter. Exact up to a size of 48; for larger masks the components come from a low-rank sketch.

        Raises:
            ConfigError: there are not more masks than components.
        """
        generator = torch.Generator().manual_seed(seed)
        logits = (_logits(part, torch.rand(part.shape, generator=generator)) for part in self.rows(masks, pca.BATCH, max_masks))
        count, means, components, variances = pca.principal_components(logits, self.size**2, self.length, centered=True)
        self.require_enough(count, self.length + 1)  # one more for the mean
        self.components.copy_(components)
        self.explained_variances.copy_(variances.clamp(min=1e-6))  # zero if there are fewer distinct masks than components
        self.means.copy_(means)
        self.mark_fitted()

    def encode(self, masks: Float[Tensor, "n S S"], noisy: bool = False) -> Float[Tensor, "n D"]:
        """Return whitened components of masks with values in [0, 1].

        Args:
            masks: to encode.
            noisy: whether the softness of every pixel is random, as in the official code; otherwise it is the middle, 0.025.

        Raises:
            ConfigError: the codec has not been fitted.
        """
        self.require_fitted()
        flat = masks.flatten(1)
        logits = _logits(flat, torch.rand_like(flat) if noisy else torch.full_like(flat, 0.5))
        return (logits - self.means) @ self.components.T / self.explained_variances.sqrt()

    def _decode(self, codes: Tensor) -> Tensor:
        logits = (codes * self.explained_variances.sqrt()) @ self.components + self.means
        return logits.sigmoid().unflatten(1, (self.size, self.size))


def _logits(masks: Tensor, random: Tensor) -> Tensor:
    """Return the logits of softened pixels, given one random number in [0, 1) for each."""
    softness = (MAX_SOFTNESS * random).clamp(min=MIN_SOFTNESS)
    soft = torch.where(masks > softness, 1 - softness, softness)
    return (soft / (1 - soft)).log()
