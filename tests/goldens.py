"""The reference arrays, and models filled with the reference's weights."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from golden import recipe
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@cache
def notes(system: str) -> dict:
    """Return what the JSON beside the arrays says of them."""
    return json.loads((FOLDER / f"{system}.json").read_text())


@cache
def _arrays(system: str):
    return np.load(FOLDER / f"{system}.npz")


def golden(system: str, name: str) -> Tensor:
    """Return one reference array."""
    return torch.from_numpy(_arrays(system)[name])


def unpacked(system: str, name: str, width: int) -> Tensor:
    """Return a boolean reference array that was stored in bits along its last axis."""
    return torch.from_numpy(np.unpackbits(_arrays(system)[name], axis=-1)[..., :width].astype(bool))


def weights(entries: list) -> dict[str, Tensor]:
    """Return the reference's state dict for (name, shape) pairs."""
    return {name: torch.from_numpy(recipe.tensor(name, tuple(shape))) for name, shape in entries}


def image(name: str, height: int, width: int) -> Tensor:
    """Return a normalized reference image [3 h w]."""
    pixels = torch.from_numpy(recipe.image(name, height, width))
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def ellipses(name: str, height: int, width: int, count: int) -> Tensor:
    """Return reference masks [count h w]."""
    return torch.from_numpy(recipe.ellipses(name, height, width, count))
