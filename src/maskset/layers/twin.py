"""SOTR's transformers: twin attention as released, and the three layers of the paper (section 3.1, figure 3).

Twin attention lets a cell attend to its column and to its row instead of to all cells: h * w * (h + w) pairs instead of
(h * w)^2. Maps are kept as [B h w C] in here, so that rows and columns are views of one tensor and nothing is copied.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from maskset.layers.mlp import Mlp
from maskset.layers.recompute import Layer

_SLOPE = 0.01  # of the leaky ReLUs


class Attention(nn.Module):
    """Multi-head self-attention among the cells of each row, of each column, or of the whole map.

    Args:
        width: C, of a cell.
        heads: how many share it.
        along: whom a cell attends to.
    """

    def __init__(self, width: int, heads: int, along: Literal["rows", "columns", "map"]) -> None:
        super().__init__()
        self.heads, self.along = heads, along
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "B h w C"], seen: "Copies | None" = None) -> Float[Tensor, "B h w C"]:
        """Return what each cell gathers; with `seen`, the keys of a row are those of two copies side by side."""
        query, key, value = self.query(x), self.key(x), self.value(x)
        if seen is not None:
            key, value = seen.both(key), seen.both(value)
        query, key, value = (self._tokens(each) for each in (query, key, value))
        found = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)  # its scale is (C / heads)^-0.5
        return self.output(found.reshape(x.shape))

    def _tokens(self, x: Float[Tensor, "B h w C"]) -> Float[Tensor, "groups split tokens c"]:
        """Return views in which the tokens that see each other lie along one axis. Rows join the batch, columns the heads."""
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


@dataclass(frozen=True)
class Copies:
    """Two copies of a map side by side that are alike but for some columns, which alone are kept twice.

    The released code works on a map and its copy, joined to one of double width. Attention keeps columns alike that are alike:
    a column attends to itself, and in a row both have the same query and the same keys. A 3x3 convolution sees the seam,
    where the other copy begins, and the borders, where nothing does. So after n pairs of 3x3 convolutions the copies differ in
    the 2n columns at either side at the most, and in exact arithmetic in no other.

    A map of this kind has the columns of the left copy, then the first `apart` columns of the right one, then its last.
    Where that would be all of them, it has both copies whole.

    Attributes:
        width: w, of one copy, cells.
        apart: how many columns at each side of the right copy may differ from the left one's.
    """

    width: int
    apart: int = 0

    @property
    def whole(self) -> bool:
        """Whether all columns of both copies are kept."""
        return 2 * self.apart >= self.width

    def right(self, x: Float[Tensor, "B h n C"]) -> Float[Tensor, "B h w C"]:
        """Return the right copy."""
        width, apart = self.width, self.apart
        if self.whole or not apart:
            return x[:, :, -width:]
        return torch.cat([x[:, :, width : width + apart], x[:, :, apart : width - apart], x[:, :, width + apart :]], 2)

    def both(self, x: Float[Tensor, "B h n C"]) -> Float[Tensor, "B h m C"]:
        """Return both copies whole. While no column differs one is enough for attention: twice all keys is no other mean."""
        return x if self.whole or not self.apart else torch.cat([x[:, :, : self.width], self.right(x)], 2)

    def for_convolutions(self, x: Float[Tensor, "B h n C"]) -> Float[Tensor, "B h m C"]:
        """Return the columns that `after_convolutions` needs: two more at each cut than those that it keeps."""
        if self.whole:
            return x
        width, apart, cut = self.width, self.apart, self.apart + 4
        if 2 * cut >= width:
            return torch.cat([x[:, :, :width], self.right(x)], 2)
        begin, end = x[:, :, apart:cut], x[:, :, width - cut : width - apart]
        return torch.cat([x[:, :, : width + apart], begin, end, x[:, :, width + apart :]], 2)

    def after_convolutions(self, x: Float[Tensor, "B h m C"]) -> tuple[Float[Tensor, "B h n C"], "Copies"]:
        """Return what two 3x3 convolutions made of `for_convolutions`, without the columns that a cut has spoilt."""
        copies = Copies(self.width, self.apart + 2)
        if copies.whole:
            return x, copies
        return torch.cat([x[:, :, : self.width + copies.apart], x[:, :, -copies.apart :]], 2), copies


class ReleasedLayer(Layer):
    """The layer of the released code: two attentions side by side, then two pairs of convolutions side by side.

    Each of the four is multiplied by a gate that starts at 0 (ReZero), and there is no norm and no MLP.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.gates = nn.Parameter(torch.zeros(4))  # of columns, rows, first and second pair of convolutions
        self.columns = Attention(width, heads, "columns")
        self.rows = Attention(width, heads, "rows")
        self.convolutions = nn.ModuleList(Convolutions(width) for _ in range(2))

    def forward(self, x: Float[Tensor, "B h n C"], copies: Copies) -> tuple[Float[Tensor, "B h m C"], Copies]:
        """Return the map after the layer, and which columns of its copies it has."""
        of_columns, of_rows, *of_pairs = self.gates
        x = x + of_columns * self.columns(x) + of_rows * self.rows(x, copies)
        x = copies.for_convolutions(x)
        one, other = (gate * pair(x) for gate, pair in zip(of_pairs, self.convolutions, strict=True))
        return copies.after_convolutions(x + one + other)


class ReleasedTransformer(nn.Module):
    """The transformer that the published weights belong to: no position embedding, double width, the mean of both copies.

    Args:
        width: C.
        heads: of each attention.
        depth: number of layers.
    """

    def __init__(self, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ReleasedLayer(width, heads) for _ in range(depth))

    def forward(self, level: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        """Return a map of the same size; h and w may be any."""
        x, copies = level.permute(0, 2, 3, 1).contiguous(), Copies(level.shape[3])
        if self.layers:  # the sum in the weights' type also under autocast, as it stays where layers have norms
            x = x.to(next(self.parameters()).dtype)
        for layer in self.layers:
            x, copies = layer(x, copies)
        return ((x[:, :, : copies.width] + copies.right(x)) / 2).permute(0, 3, 1, 2)


class PaperLayer(Layer):
    """A transformer layer of figure 3: (a) full, (b) pure twin, (c) hybrid twin; a norm before each of its two parts."""

    def __init__(self, kind: Literal["full", "pure-twin", "hybrid-twin"], width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm, self.rest_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        if kind == "full":
            self.attention = Attention(width, heads, "map")
        else:
            self.attention = nn.Sequential(Attention(width, heads, "columns"), Attention(width, heads, "rows"))
        self.rest = Convolutions(width) if kind == "hybrid-twin" else Mlp(width, 4 * width, width)

    def forward(self, x: Float[Tensor, "B h w C"]) -> Float[Tensor, "B h w C"]:
        """Return a map of the same size."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.rest(self.rest_norm(x))


class PaperTransformer(nn.Module):
    """The transformer as the paper describes it, with learnt embeddings of row and column.

    Args:
        kind: which of the paper's layers.
        width: C.
        heads: of each attention.
        depth: number of layers.
        cells: h and w that the embeddings are learnt for; for other sizes they are resized.
    """

    def __init__(self, kind: Literal["full", "pure-twin", "hybrid-twin"], width: int, heads: int, depth: int, cells: int) -> None:
        super().__init__()
        self.row_embedding = nn.Parameter(0.02 * torch.randn(width, cells))
        self.column_embedding = nn.Parameter(0.02 * torch.randn(width, cells))
        self.layers = nn.ModuleList(PaperLayer(kind, width, heads) for _ in range(depth))

    def forward(self, level: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        """Return a map of the same size; h and w may be any."""
        rows, columns = (
            F.interpolate(table[None], size=cells, mode="linear")
            for table, cells in zip((self.row_embedding, self.column_embedding), level.shape[2:], strict=True)
        )
        x = (level + rows[..., None] + columns[..., None, :]).permute(0, 2, 3, 1).contiguous()
        for layer in self.layers:
            x = layer(x)
        return x.permute(0, 3, 1, 2)
