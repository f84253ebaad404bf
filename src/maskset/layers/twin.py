"""SOTR's transformers: twin attention as released, and the three layers of the paper (section 3.1, figure 3).

In twin attention a cell attends to its column and to its row instead of to all cells: h * w * (h + w) pairs instead of (h * w)^2.
Maps are [B h w C] in this file, so that rows and columns are views of one tensor and nothing is copied.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from maskset.kernels.twin import run_compact
from maskset.layers.blocks import Layer, Mlp

_SLOPE = 0.01  # of the leaky ReLUs


class Attention(nn.Module):
    """Multi-head self-attention among the cells of each row, of each column, or of the whole map.

    Args:
        width: C, channels of a cell.
        heads: number of heads, which divide the channels.
        along: which cells a cell attends to.
    """

    def __init__(self, width: int, heads: int, along: Literal["rows", "columns", "map"]) -> None:
        super().__init__()
        self.heads, self.along = heads, along
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "B h w C"]) -> Float[Tensor, "B h w C"]:
        """Return the attended values of each cell."""
        return self.attend(self.query(x), self.key(x), self.value(x))

    def attend(
        self, query: Float[Tensor, "B h w C"], key: Float[Tensor, "B h m C"], value: Float[Tensor, "B h m C"]
    ) -> Float[Tensor, "B h w C"]:
        """Return the output for projected queries, keys and values."""
        queries, keys, values = (self._tokens(x) for x in (query, key, value))
        attended = F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2)  # its scale is (C / heads)^-0.5
        return self.output(attended.reshape(query.shape))

    def _tokens(self, x: Float[Tensor, "B h w C"]) -> Float[Tensor, "groups heads tokens c"]:
        """Return the tokens as a view [groups, heads, tokens, c].

        Within rows, the row index is folded into the batch axis; within columns, the column index is folded into the head axis.
        """
        x = x.unflatten(3, (self.heads, -1))
        if self.along == "columns":
            return x.flatten(2, 3).transpose(1, 2)
        return x.flatten(*((0, 1) if self.along == "rows" else (1, 2))).transpose(1, 2)


class Convolutions(nn.Module):
    """Two 3x3 convolutions with a leaky ReLU between them.

    Args:
        width: C.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Float[Tensor, "B h w C"]) -> Float[Tensor, "B h w C"]:
        """Return a map of the same size."""
        hidden = F.leaky_relu(self.first(x.permute(0, 3, 1, 2)), _SLOPE)
        return self.second(hidden).permute(0, 2, 3, 1)


class ReleasedLayer(Layer):
    """The layer of the released code: column and row attention in parallel, then two pairs of convolutions in parallel.

    Each of these four branches is multiplied by a learned gate, initially 0, and added to its input (ReZero; Bachlechner et al.,
    UAI 2021). There is no norm and no MLP.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.gates = nn.Parameter(torch.zeros(4))  # factors of column attention, row attention, and both pairs of convolutions
        self.columns = Attention(width, heads, "columns")
        self.rows = Attention(width, heads, "rows")
        self.convolutions = nn.ModuleList(Convolutions(width) for _ in range(2))

    def forward(self, x: Float[Tensor, "B h w C"]) -> Float[Tensor, "B h w C"]:
        """Return a map of the same size."""
        column_gate, row_gate, first_gate, second_gate = self.gates
        x = x + column_gate * self.columns(x) + row_gate * self.rows(x)
        first, second = self.convolutions
        return x + first_gate * first(x) + second_gate * second(x)


class ReleasedTransformer(nn.Module):
    """The transformer of the published weights. It has no position embedding.

    It concatenates the map and a copy of it to a map of double width, applies all layers, and averages both copies.

    Args:
        width: C, channels.
        heads: heads of each attention.
        depth: number of layers.

    Attributes:
        fast: whether to compute columns that are equal in both copies only once, which gives the same result.
    """

    fast = True

    def __init__(self, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ReleasedLayer(width, heads) for _ in range(depth))

    def forward(self, level: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        """Return a map of the same size, which may be any."""
        x = level.permute(0, 2, 3, 1).contiguous()
        if self.layers:  # the residual sum has the type of the weights, also under autocast
            x = x.to(next(self.parameters()).dtype)
        x = run_compact(self.layers, x) if self.fast else self._run_doubled(x)  # Fast path: kernels/twin.py
        return x.permute(0, 3, 1, 2)

    def _run_doubled(self, x: Float[Tensor, "B h w C"]) -> Float[Tensor, "B h w C"]:
        x = torch.cat([x, x], 2)
        for layer in self.layers:
            x = layer(x)
        left, right = x.chunk(2, 2)
        return (left + right) / 2


class PaperLayer(Layer):
    """A transformer layer of figure 3: (a) full, (b) pure twin, (c) hybrid twin, with a layer norm before both of its parts."""

    def __init__(self, kind: Literal["full", "pure-twin", "hybrid-twin"], width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm, self.rest_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        if kind == "full":
            self.attention = Attention(width, heads, "map")
        else:
            self.attention = nn.Sequential(Attention(width, heads, "columns"), Attention(width, heads, "rows"))
        # The second part of the layer. Checkpoints name it "rest".
        self.rest = Convolutions(width) if kind == "hybrid-twin" else Mlp(width, 4 * width, width)

    def forward(self, x: Float[Tensor, "B h w C"]) -> Float[Tensor, "B h w C"]:
        """Return a map of the same size."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.rest(self.rest_norm(x))


class PaperTransformer(nn.Module):
    """The transformer as the paper describes it, with learned embeddings of row and column.

    Args:
        kind: layer of figure 3.
        width: C, channels.
        heads: heads of each attention.
        depth: number of layers.
        cells: h and w of the learned embeddings; they are resized for other sizes.
    """

    def __init__(self, kind: Literal["full", "pure-twin", "hybrid-twin"], width: int, heads: int, depth: int, cells: int) -> None:
        super().__init__()
        self.row_embedding = nn.Parameter(0.02 * torch.randn(width, cells))
        self.column_embedding = nn.Parameter(0.02 * torch.randn(width, cells))
        self.layers = nn.ModuleList(PaperLayer(kind, width, heads) for _ in range(depth))

    def forward(self, level: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        """Return a map of the same size, which may be any."""
        rows, columns = (
            F.interpolate(table[None], size=cells, mode="linear")
            for table, cells in zip((self.row_embedding, self.column_embedding), level.shape[2:], strict=True)
        )
        x = (level + rows[..., None] + columns[..., None, :]).permute(0, 2, 3, 1).contiguous()
        for layer in self.layers:
            x = layer(x)
        return x.permute(0, 3, 1, 2)
