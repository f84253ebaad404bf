"""Recurrent refinement (ISTR, section 3.3): object features attend to their regions of interest, and boxes are corrected."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from maskset import boxes as box_ops
from maskset.layers.blocks import Layer

_DELTA_SCALE = (2.0, 2.0, 1.0, 1.0)  # predicted deltas of x, y, width, height are divided by these
_MAX_GROWTH = math.log(100_000 / 16)  # of the logarithm of a side in one step


class DynamicAttention(nn.Module):
    """Two layers on the features of a region, with weights predicted from the object's feature (equation 11; Sparse R-CNN).

    Args:
        width: C, of the features.
        hidden: between the two layers.
        size: s, side of the region's grid, cells.
    """

    def __init__(self, width: int, hidden: int, size: int) -> None:
        super().__init__()
        self.weights = nn.Linear(width, 2 * width * hidden)
        self.hidden_norm = nn.LayerNorm(hidden)
        self.cell_norm = nn.LayerNorm(width)
        self.output = nn.Linear(size * size * width, width)
        self.output_norm = nn.LayerNorm(width)

    def forward(self, objects: Float[Tensor, "n C"], regions: Float[Tensor, "n C s s"]) -> Float[Tensor, "n C"]:
        """Return one feature for each object and its region."""
        first, second = self.weights(objects).chunk(2, 1)
        width, hidden = objects.shape[1], self.hidden_norm.normalized_shape[0]
        cells = regions.flatten(2).transpose(1, 2)  # [n s*s C], row-major
        cells = F.elu(self.hidden_norm(cells @ first.view(-1, width, hidden)))
        cells = F.elu(self.cell_norm(cells @ second.view(-1, hidden, width)))
        return F.elu(self.output_norm(self.output(cells.flatten(1))))


class RegionAttention(nn.Module):
    """Multi-head attention from an object's feature to the cells of its region, the alternative in table 1d.

    Args:
        width: C, of the features.
        heads: of the attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, objects: Float[Tensor, "n C"], regions: Float[Tensor, "n C s s"]) -> Float[Tensor, "n C"]:
        """Return one feature for each object and its region."""
        cells = regions.flatten(2).transpose(1, 2)
        return self.attention(objects[:, None], cells, cells, need_weights=False)[0][:, 0]


class RegionEncoder(Layer):
    """The Transformer encoder of one stage (figure 2): self-attention among objects, attention to their regions, and an MLP.

    Args:
        width: C, of the objects' features.
        heads: of the self-attention.
        hidden: of the MLP.
        dropout: in self-attention and the MLP, and before each residual sum.
        attention: from an object to its region.
    """

    def __init__(
        self, width: int, heads: int, hidden: int, dropout: float, attention: DynamicAttention | RegionAttention
    ) -> None:
        super().__init__()
        self.self_attention = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)
        self.self_norm = nn.LayerNorm(width)
        self.region_attention = attention
        self.region_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, objects: Float[Tensor, "B N C"], regions: Float[Tensor, "B*N C s s"]) -> Float[Tensor, "B N C"]:
        """Return new features of the objects, given those of their regions."""
        attended = self.self_attention(objects, objects, objects, need_weights=False)[0]
        objects = self.self_norm(objects + self.dropout(attended))
        attended = self.region_attention(objects.flatten(0, 1), regions).view_as(objects)
        objects = self.region_norm(objects + self.dropout(attended))
        return self.norm(objects + self.dropout(self.down(self.dropout(F.elu(self.up(objects))))))


class Tower(nn.Module):
    """Three linear layers without bias, each followed by layer norm and ELU: the hidden layers of a prediction head.

    Args:
        width: C, of the objects' features.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in self.layers)

    def forward(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        """Return features of the same shape."""
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.elu(norm(layer(x)))
        return x


def reset_stage(stage: nn.Module, class_head: nn.Linear) -> None:
    """Initialize a stage as the official code does: Xavier for all matrices and kernels, a probability of 0.01 for each class.

    The official code is meant to set the class bias, but sets every tensor whose last dimension is the number of classes.
    """
    for parameter in (*stage.parameters(), class_head.weight):
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    nn.init.constant_(class_head.bias, -math.log(99))


def image_feature(
    levels: Sequence[Float[Tensor, "B C _ _"]],
    pooling: Literal["mean", "max"],
    paddings: Sequence[Bool[Tensor, "B _ _"]] | None = None,
) -> Float[Tensor, "B C"]:
    """Return the sum over levels of the mean or maximum over their cells: the image feature P of section 3.3.

    Args:
        levels: of the feature pyramid.
        pooling: mean or maximum.
        paddings: which cells are padding, which is ignored; None: padding counts as image, as in the official code.
    """
    pooled = []
    for i, level in enumerate(levels):
        inside = None if paddings is None else ~paddings[i][:, None]
        if pooling == "max":
            pooled.append((level if inside is None else level.masked_fill(~inside, -torch.inf)).amax((2, 3)))
        elif inside is None:
            pooled.append(level.mean((2, 3)))
        else:
            pooled.append((level * inside).sum((2, 3)) / inside.sum((2, 3)))
    return torch.stack(pooled).sum(0)


def apply_deltas(boxes: Float[Tensor, "B N 4"], deltas: Float[Tensor, "B N 4"]) -> Float[Tensor, "B N 4"]:
    """Return corner boxes corrected by predicted deltas: R-CNN's update of center and size, not clipped to the image.

    The center moves by half of delta times the box's side; the side is multiplied by exp(delta), at most 6250 times.
    """
    center, side = box_ops.to_centers(boxes).split(2, -1)
    shift, growth = (deltas / deltas.new_tensor(_DELTA_SCALE)).split(2, -1)
    side_after = side * growth.clamp(max=_MAX_GROWTH).exp()
    return box_ops.to_corners(torch.cat([center + shift * side, side_after], -1))
