"""The instance-aware transformer of SOIT (figure 3, eq. 1 to 4): D numbers are the weights of a network that predicts one mask.

Each pixel of the mask features is a query. Its position relative to the center of the instance is added, and it samples K points
around itself for each of M heads (deformable attention); the result is projected to a logit. With C channels the network has
D = 2CMK + 2MK + CMK + MK + C + 1 weights: 441 for C = 8, M = 4, K = 4.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from maskset.kernels.attention import deformable_attention
from maskset.kernels.instance_transformer import fused, usable
from maskset.layers.blocks import cell_grid, frequencies, valid_fractions

Positions = Literal["relative", "absolute", "none"]
Features = Float[Tensor, "C h w"]
Padding = Bool[Tensor, "h w"]  # True on padding
Centers = Float[Tensor, "n 2"]  # x and y of each instance's box, fractions of the unpadded image
Logits = Float[Tensor, "n h w"]


def part_shapes(channels: int, heads: int, points: int) -> list[tuple[int, ...]]:
    """Return the shapes of the weights that the D numbers stand for, in order.

    They are weight and bias of the sampling offsets (rows: head, point, x and y), of the attention (rows: head, point), and
    of the output.
    """
    samples = heads * points
    return [(2 * samples, channels), (2 * samples,), (samples, channels), (samples,), (channels,), (1,)]


def parameter_count(channels: int, heads: int, points: int) -> int:
    """Return D, the number of weights."""
    return sum(math.prod(shape) for shape in part_shapes(channels, heads, points))


def instance_transformer(
    features: Features,
    padding: Padding,
    weights: Float[Tensor, "n D"],
    centers: Centers,
    heads: int,
    points: int,
    positions: Positions = "relative",
) -> Logits:
    """Return the mask logits of all instances of one image.

    The paper has no ReLU before the output; the official code, and its published results, have one.

    Args:
        features: of the image.
        padding: True on padding, which is sampled as zero.
        weights: the D numbers of each instance.
        centers: x and y of each instance's box, fractions of the unpadded image.
        heads: M; it divides C.
        points: K.
        positions: relative to the instance's center, absolute (relative to the image's corner), or none (Table 4).
    """
    parts = _parts(weights, features.shape[0], heads, points)
    origins = {"relative": centers, "absolute": torch.zeros_like(centers), "none": None}[positions]
    fast = usable(features, weights, centers, heads, points) and _is_rectangle(~padding)
    compute = _logits_in_c if fast else _logits  # Fast path: kernels/csrc/instance_transformer.c
    return compute(features, padding, parts, origins, heads, points)


def _logits(
    features: Features, padding: Padding, parts: Sequence[Tensor], centers: Centers | None, heads: int, points: int
) -> Logits:
    """Return the logits step by step, as in the paper."""
    offset, offset_bias, attention, attention_bias, output, output_bias = parts
    channels, height, width = features.shape
    count, cells = len(output), height * width
    query = features.flatten(1).T.expand(count, -1, -1)  # [n h*w C]
    if centers is not None:
        query = query + encode_positions(padding, centers, channels).flatten(2).transpose(1, 2)
    offsets = torch.baddbmm(offset_bias[:, None], query, offset.transpose(1, 2)).view(count, cells, heads, points, 2)
    scores = torch.baddbmm(attention_bias[:, None], query, attention.transpose(1, 2)).view(count, cells, heads, points)
    size = features.new_tensor([width, height])
    locations = (cell_grid(height, width, like=features) / size)[:, None, None, :] + offsets / size
    value = features.masked_fill(padding, 0.0).flatten(1).T.reshape(1, cells, heads, channels // heads)
    attended = deformable_attention(
        value,
        [(height, width)],
        locations.reshape(1, count * cells, heads, 1, points, 2),
        scores.softmax(-1).view(1, count * cells, heads, 1, points),
    )
    logits = torch.baddbmm(output_bias[:, None], attended.view(count, cells, channels).relu(), output[:, :, None])
    return logits.view(count, height, width)


def _logits_in_c(
    features: Features, padding: Padding, parts: Sequence[Tensor], centers: Centers | None, heads: int, points: int
) -> Logits:
    """Return the same, computed by the C library; the cells that are not padding must form a rectangle."""
    offset, offset_bias, attention, attention_bias, output, output_bias = parts
    count, samples, channels = attention.shape
    half = channels // 2
    row_in, column_in = (~padding).any(1), (~padding).any(0)
    if centers is None:
        rows, columns = (features.new_zeros(count, 2, len(inside), half) for inside in (row_in, column_in))
    else:
        rows, columns = (_along(inside, centers[:, i], half) for inside, i in ((row_in, 1), (column_in, 0)))
    steps = torch.cat([offset.view(count, samples, 2, channels), attention[:, :, None]], 2)  # [n S 3 C]: x, y, score
    biases = torch.cat([offset_bias.view(count, samples, 2), attention_bias[:, :, None]], 2)
    mixing = torch.cat([steps, biases[..., None]], 3).permute(0, 3, 2, 1)  # [n C+1 3 S]
    cells = features.permute(1, 2, 0)
    return fused(
        cells.contiguous(),
        cells.masked_fill(padding[..., None], 0.0).contiguous(),
        rows.to(features.dtype).contiguous(),
        columns.to(features.dtype).contiguous(),
        row_in.byte(),
        column_in.byte(),
        mixing.contiguous(),
        torch.cat([output, output_bias], 1),
        heads,
    )


def _is_rectangle(valid: Bool[Tensor, "h w"]) -> bool:
    """Return whether the valid cells are exactly the product of the valid rows and the valid columns."""
    return torch.equal(valid, valid.any(1)[:, None] & valid.any(0))


def _along(inside: Bool[Tensor, "cells"], center: Float[Tensor, "n"], channels: int) -> Float[Tensor, "n 2 cells channels"]:
    """Return `encode_positions` along one axis, for cells that are padding along the other axis (position 0) and for others."""
    count = inside.cumsum(0, dtype=torch.float32)
    place = torch.stack([torch.zeros_like(count), count / (count[-1:] + 1e-6)]) - center[:, None, None]
    return frequencies(place * (2 * math.pi), channels)


def encode_positions(padding: Padding, centers: Centers, channels: int) -> Float[Tensor, "n channels h w"]:
    """Return the sine encoding of pixel positions relative to each center (x, y): y in the first half of the channels, then x.

    Positions and centers are fractions of the unpadded image; a pixel's position is its lower right corner.
    """
    y, x = valid_fractions(padding[None], 0.0)
    encoded = [
        frequencies((fraction - center[:, None, None]) * (2 * math.pi), channels // 2)
        for fraction, center in ((y, centers[:, 1]), (x, centers[:, 0]))
    ]
    return torch.cat(encoded, -1).permute(0, 3, 1, 2)


def _parts(weights: Float[Tensor, "n D"], channels: int, heads: int, points: int) -> Sequence[Tensor]:
    shapes = part_shapes(channels, heads, points)
    parts = weights.split([math.prod(shape) for shape in shapes], dim=1)
    return [part.view(len(weights), *shape) for part, shape in zip(parts, shapes, strict=True)]
