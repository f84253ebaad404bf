"""The fast path of SOTR's released transformer: columns in which the two copies of the map agree are computed once.

The plain twin is `maskset.layers.twin`: the map and its copy, joined to a map of double width, go through all layers. Attention
does not make the copies differ: a column attends to itself, and in a row both copies have the same queries and the same keys. A
3x3 convolution does, because it sees the seam between the copies and the borders. So after n pairs of 3x3 convolutions the copies
differ in at most 2n columns at either side, and in exact arithmetic in no other.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Copies:
    """Which columns a map holds of two copies side by side that agree except near their borders.

    Such a map holds the columns of the left copy, then the first and the last `apart` columns of the right copy. If that would be
    all of them, it holds both copies whole.

    Attributes:
        width: w, of one copy, cells.
        apart: number of columns at each side of the right copy that may differ from the left copy.
    """

    width: int
    apart: int = 0

    @property
    def whole(self) -> bool:
        """Whether all columns of both copies are held."""
        return 2 * self.apart >= self.width

    def right(self, x: Float[Tensor, "B h n C"]) -> Float[Tensor, "B h w C"]:
        """Return the right copy."""
        width, apart = self.width, self.apart
        if self.whole or not apart:
            return x[:, :, -width:]
        return torch.cat([x[:, :, width : width + apart], x[:, :, apart : width - apart], x[:, :, width + apart :]], 2)

    def both(self, x: Float[Tensor, "B h n C"]) -> Float[Tensor, "B h m C"]:
        """Return keys or values of both copies.

        If no column differs, one copy suffices: duplicating every key does not change a softmax average.
        """
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
        """Return the output of two 3x3 convolutions of `for_convolutions` without the columns next to a cut."""
        copies = Copies(self.width, self.apart + 2)
        if copies.whole:
            return x, copies
        return torch.cat([x[:, :, : self.width + copies.apart], x[:, :, -copies.apart :]], 2), copies


def mean_of_copies(layers: Iterable[Any], x: Float[Tensor, "B h w C"]) -> Float[Tensor, "B h w C"]:
    """Return the mean of both copies of a map after all layers.

    Args:
        layers: `maskset.layers.twin.ReleasedLayer`s.
        x: one copy.
    """
    copies = Copies(x.shape[2])
    for layer in layers:
        x, copies = layer.run(_layer, layer, x, copies)
    return (x[:, :, : copies.width] + copies.right(x)) / 2


def _layer(layer: Any, x: Float[Tensor, "B h n C"], copies: Copies) -> tuple[Float[Tensor, "B h m C"], Copies]:
    """Return the map after one layer, and which columns it holds: the steps of `ReleasedLayer.forward`."""
    of_columns, of_rows, of_first, of_second = layer.gates
    rows = layer.rows
    along_rows = rows.attend(rows.query(x), copies.both(rows.key(x)), copies.both(rows.value(x)))
    x = x + of_columns * layer.columns(x) + of_rows * along_rows
    x = copies.for_convolutions(x)
    first, second = layer.convolutions
    return copies.after_convolutions(x + of_first * first(x) + of_second * second(x))
