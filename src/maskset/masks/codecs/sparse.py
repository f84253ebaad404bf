"""The sparse code (SOLQ, section 3.2, equation 3): a mask as a sum of few atoms of a dictionary that is learnt from masks.

The paper gives neither the sizes nor beta, nor how the dictionary was learnt. Here it is learnt by online dictionary learning
(Mairal et al., 2009) and codes are found by FISTA (Beck and Teboulle, 2009). The defaults were chosen by measuring on 28 x 28
masks with 256 atoms (the paper's n_k), learnt on the train and measured on the val split, as mean IoU inside the box / numbers
that are not zero:

    beta       0.03        0.1         0.3        1.0        3.0
    COCO       0.990/247   0.983/172   0.950/73   0.903/30   0.843/17
    nuclei     0.992/247   0.989/131   0.978/62   0.960/40   0.933/30

0.3 is the value at which the code is about as large as the 60 principal components that the official code uses at this size
(0.940 and 0.978). After 100 iterations the objective is within 1 % of what 300 reach.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from maskset.errors import ConfigError
from maskset.masks.codecs.files import MOST_MASKS, require_enough, require_fitted, rows

BETA_PER_PIXEL = 0.3 / 28  # beta for masks of side 1: v grows with the side of the mask, and so must beta, for equally few atoms
ITERATIONS = 100  # of FISTA for one code
LEARNING_STEPS, LEARNING_BATCH, LEARNING_ITERATIONS = 200, 512, 30  # batches, masks in each, iterations of FISTA for them


class SparseCodec(nn.Module):
    """Turns box-local masks into coefficients of a dictionary's atoms, most of them zero, and back.

    Args:
        size: side S of the mask, pixels.
        length: D, how many atoms the dictionary has.
        beta: weight of |v| against the squared error; None gives 0.3 for a size of 28, and in proportion for others.

    Raises:
        ConfigError: `size`, `length` or `beta` is not positive.
    """

    atoms: Float[Tensor, "D P"]
    curvature: Float[Tensor, ""]
    beta: Float[Tensor, ""]
    fitted: Bool[Tensor, ""]

    def __init__(self, size: int = 28, length: int = 256, beta: float | None = None) -> None:
        super().__init__()
        beta = BETA_PER_PIXEL * size if beta is None else beta
        if min(size, length) < 1 or beta <= 0:
            raise ConfigError(f"a sparse code needs a positive size, length and beta, got {size}, {length} and {beta}.")
        self.size, self.length = size, length
        self.register_buffer("atoms", torch.zeros(length, size * size))
        self.register_buffer("curvature", torch.tensor(0.0))  # the largest eigenvalue of D D^T
        self.register_buffer("beta", torch.tensor(beta))  # saved, since a dictionary goes with the beta that it was learnt with
        self.register_buffer("fitted", torch.tensor(False))

    def fit(self, masks: Tensor | Iterable[Tensor], most_masks: int = MOST_MASKS, seed: int = 0) -> None:
        """Learn the dictionary from masks [n S S] in [0, 1], given whole or in batches.

        They are kept in memory (booleans take a byte per pixel); how they are batched does not matter.

        Args:
            masks: what to learn from.
            most_masks: how many count, the first ones.
            seed: of the first atoms, and of the order in which masks are looked at.

        Raises:
            ConfigError: there are fewer masks than atoms.
        """
        every = torch.cat([torch.zeros(0, self.size**2, dtype=torch.bool), *rows(masks, LEARNING_BATCH, most_masks)])
        require_enough(self, len(every), self.length)
        atoms = _learn(every, self.length, float(self.beta), torch.Generator().manual_seed(seed))
        self.atoms.copy_(atoms)
        self.curvature.fill_(_curvature(atoms))
        self.fitted.fill_(True)

    def encode(self, masks: Float[Tensor, "n S S"]) -> Float[Tensor, "n D"]:
        """Return the v that minimises 1/2 |m - v D|^2 + beta |v|_1 for masks m with values in [0, 1].

        Raises:
            ConfigError: `fit` has not been called, nor fitted weights loaded.
        """
        require_fitted(self)
        return _fista(masks.flatten(1), self.atoms, self.curvature, self.beta, ITERATIONS)

    def decode(self, codes: Float[Tensor, "n D"]) -> Float[Tensor, "n S S"]:
        """Return m = v D; the caller chooses the threshold.

        Raises:
            ConfigError: `fit` has not been called, nor fitted weights loaded.
        """
        require_fitted(self)
        return (codes @ self.atoms).unflatten(1, (self.size, self.size))


def _fista(
    masks: Float[Tensor, "n P"],
    atoms: Float[Tensor, "D P"],
    curvature: Float[Tensor, ""] | float,
    beta: Float[Tensor, ""] | float,
    iterations: int,
) -> Float[Tensor, "n D"]:
    """Return the codes after some iterations of the accelerated proximal gradient method, begun at zero."""
    gram, target = atoms @ atoms.T, masks @ atoms.T
    codes = ahead = torch.zeros_like(target)
    momentum = 1.0
    for _ in range(iterations):
        stepped = ahead - (ahead @ gram - target) / curvature
        shrunk = stepped.sign() * (stepped.abs() - beta / curvature).clamp(min=0)
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = shrunk + (momentum - 1) / following * (shrunk - codes)
        codes, momentum = shrunk, following
    return codes


def _learn(masks: Tensor, length: int, beta: float, generator: torch.Generator) -> Float[Tensor, "D P"]:
    """Return atoms of unit norm, learnt from masks [n P]: code a random batch, then improve one atom after the other."""
    chosen = masks[torch.randperm(len(masks), generator=generator)[:length]].float()
    noise = torch.randn(chosen.shape, generator=generator)  # two equal masks must not give two equal atoms
    atoms = F.normalize(chosen + 0.1 * noise, dim=1)
    among_codes, with_masks = torch.zeros(length, length), torch.zeros_like(atoms)  # sums of v^T v and of v^T m
    for step in range(LEARNING_STEPS):
        batch = masks[torch.randint(len(masks), (LEARNING_BATCH,), generator=generator)].float()
        codes = _fista(batch, atoms, _curvature(atoms), beta, LEARNING_ITERATIONS)
        remembered = (step / (step + 1)) ** 2  # early codes belong to a dictionary that is long gone
        among_codes = remembered * among_codes + codes.T @ codes
        with_masks = remembered * with_masks + codes.T @ batch
        _improve(atoms, among_codes, with_masks, batch - codes @ atoms)
    return atoms


def _improve(atoms: Float[Tensor, "D P"], among_codes: Tensor, with_masks: Tensor, errors: Float[Tensor, "n P"]) -> None:
    """Move each atom in place to where the remembered squared error is least; one in no use becomes what a mask still lacks."""
    for i, weight in enumerate(among_codes.diagonal().tolist()):
        if weight > 1e-6:
            atoms[i] += (with_masks[i] - among_codes[i] @ atoms) / weight
        else:
            atoms[i] = errors[i % len(errors)]
        atoms[i] = F.normalize(atoms[i], dim=0)


def _curvature(atoms: Float[Tensor, "D P"]) -> float:
    """Return the largest eigenvalue of D D^T, the inverse of the longest step that is sure to go downhill."""
    return float(torch.linalg.eigvalsh(atoms @ atoms.T)[-1])
