"""A multi-layer perceptron, and heads that start alike."""

import copy
from itertools import pairwise

from torch import Tensor, nn


class Mlp(nn.Module):
    """Linear layers with ReLU between them.

    Args:
        widths: of the input, each hidden layer and the output.
    """

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., last width] for [..., first width]."""
        for layer in self.layers[:-1]:
            x = layer(x).relu_()
        return self.layers[-1](x)

    @property
    def last(self) -> nn.Linear:
        """The output layer, for the initialisation that a paper asks for."""
        return self.layers[-1]  # type: ignore[return-value]


def copies(module: nn.Module, count: int) -> nn.ModuleList:
    """Return `count` copies that start alike, such as one head for every decoder layer."""
    return nn.ModuleList(copy.deepcopy(module) for _ in range(count))
