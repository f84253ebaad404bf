"""The fast path of SOTR's released transformer (twin attention): columns that are equal in both copies are computed once.

The plain version is `ReleasedTransformer` in `maskset.layers.twin`: the map and a copy of it, side by side, pass all layers.
Attention keeps the copies equal: a column attends to itself, and in a row both copies have the same queries and the same keys. A
3x3 convolution does not, because it reads across the seam between the copies and the outer borders. After n layers, each with
two 3x3 convolutions in sequence, the copies differ in at most 2n columns at each side and, in exact arithmetic, in no other.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class CompactLayout:
    """The layout of a compact map of two copies that are equal except near their borders.

    The compact map has the columns of the left copy, then the first and last `border` columns of the right copy. If these are all
    columns of the right copy, it is the complete map of both copies.

    Attributes:
        width: w, of one copy, cells.
        border: number of columns at each side of the right copy that may differ from the left copy.
    """

    width: int
    border: int = 0

    @property
    def complete(self) -> bool:
        """Whether the map has all columns of both copies."""
        return 2 * self.border >= self.width

    def right(self, x: Float[Tensor, "B h n C"]) -> Float[Tensor, "B h w C"]:
        """Return the right copy."""
        width, border = self.width, self.border
        if self.complete or not border:
            return x[:, :, -width:]
        return torch.cat([x[:, :, width : width + border], x[:, :, border : width - border], x[:, :, width + border :]], 2)

    def both(self, x: Float[Tensor, "B h n C"]) -> Float[Tensor, "B h m C"]:
        """Return keys or values of both copies.

        If no column differs, one copy suffices: duplicating every key does not change a softmax average.
        """
        return x if self.complete or not self.border else torch.cat([x[:, :, : self.width], self.right(x)], 2)

    def for_convolutions(self, x: Float[Tensor, "B h n C"]) -> Float[Tensor, "B h m C"]:
        """Return the columns that two 3x3 convolutions need: two more at each cut than `after_convolutions` returns."""
        if self.complete:
            return x
        width, border, cut = self.width, self.border, self.border + 4
        if 2 * cut >= width:
            return torch.cat([x[:, :, :width], self.right(x)], 2)
        begin, end = x[:, :, border:cut], x[:, :, width - cut : width - border]
        return torch.cat([x[:, :, : width + border], begin, end, x[:, :, width + border :]], 2)

    def after_convolutions(self, x: Float[Tensor, "B h m C"]) -> tuple[Float[Tensor, "B h n C"], "CompactLayout"]:
        """Return the output of two 3x3 convolutions without the columns next to a cut, which are wrong, and its layout."""
        layout = CompactLayout(self.width, self.border + 2)
        if layout.complete:
            return x, layout
        return torch.cat([x[:, :, : self.width + layout.border], x[:, :, -layout.border :]], 2), layout


def run_compact(layers: Iterable[Any], x: Float[Tensor, "B h w C"]) -> Float[Tensor, "B h w C"]:
    """Return the mean of both copies of a map after all layers.

    Args:
        layers: `maskset.layers.twin.ReleasedLayer`s.
        x: one copy.
    """
    layout = CompactLayout(x.shape[2])
    for layer in layers:
        x, layout = layer.run(_run_layer, layer, x, layout)  # with activation checkpointing, see `Layer.run`
    return (x[:, :, : layout.width] + layout.right(x)) / 2


def _run_layer(layer: Any, x: Float[Tensor, "B h n C"], layout: CompactLayout) -> tuple[Float[Tensor, "B h m C"], CompactLayout]:
    """Return the map after one layer and its layout: the steps of `ReleasedLayer.forward`."""
    column_gate, row_gate, first_gate, second_gate = layer.gates
    rows = layer.rows
    along_rows = rows.attend(rows.query(x), layout.both(rows.key(x)), layout.both(rows.value(x)))
    x = x + column_gate * layer.columns(x) + row_gate * along_rows
    x = layout.for_convolutions(x)
    first, second = layer.convolutions
    return layout.after_convolutions(x + first_gate * first(x) + second_gate * second(x))
