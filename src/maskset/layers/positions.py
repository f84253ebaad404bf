"""Position encodings."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def frequencies(position: Float[Tensor, "*n"], channels: int, temperature: float = 10000.0) -> Float[Tensor, "*n channels"]:
    """Return sine (even channels) and cosine (odd ones) of a position in radians at `channels` / 2 wavelengths."""
    pair = torch.arange(channels, device=position.device).div(2, rounding_mode="floor")
    angle = position[..., None] / temperature ** (2 * pair / channels)
    return torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1).flatten(-2)


def sine_positions(padding: Bool[Tensor, "B h w"], channels: int) -> Float[Tensor, "B h*w channels"]:
    """Return the encoding of each cell's place in the valid part of its map, y in the first half of the channels, then x.

    A cell's place is its centre (the -0.5 is Deformable DETR's; DETR has none), as a fraction of the valid height and width
    times 2 pi (DETR, appendix A.4).
    """
    valid = ~padding
    encoded = []
    for axis in (1, 2):
        count = valid.cumsum(axis, dtype=torch.float32)
        total = count[:, -1:, :] if axis == 1 else count[:, :, -1:]
        encoded.append(frequencies((count - 0.5) / (total + 1e-6) * (2 * math.pi), channels // 2))
    return torch.cat(encoded, dim=-1).flatten(1, 2)
