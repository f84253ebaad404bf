"""The DCT codec (SOLQ, section 3.2): the low frequencies of a mask in zig-zag order. It has no parameters to fit."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from maskset.errors import ConfigError
from maskset.masks.codecs import Float32Module


def zigzag(size: int) -> list[int]:
    """Return the flat indices row * size + column of a size x size spectrum from low to high frequency, as JPEG scans it.

    The scan follows the antidiagonals, row + column = 0, 1, 2, ...: odd ones downward, even ones upward.
    """
    cells = [(row, column) for row in range(size) for column in range(size)]
    cells.sort(key=lambda cell: (sum(cell), cell[0] if sum(cell) % 2 else cell[1]))
    return [row * size + column for row, column in cells]


def dct_basis(size: int) -> Float[Tensor, "S S"]:
    """Return the orthonormal transform matrix A: A[h, l] = sqrt((1 + sign(h)) / N) cos((l + 0.5) pi h / N), with N = size."""
    frequency = torch.arange(size, dtype=torch.float64)[:, None]
    position = torch.arange(size, dtype=torch.float64)[None, :] + 0.5
    scale = torch.full((size, 1), math.sqrt(2 / size), dtype=torch.float64)
    scale[0] = math.sqrt(1 / size)
    return scale * torch.cos(position * math.pi / size * frequency)


class DctCodec(Float32Module):
    """Turns box-local masks into their low frequencies and back.

    The first D cells of the zig-zag lie in few rows and columns of the spectrum (23 and 22 of 128 for D = 256), and only
    these rows of the basis are stored and multiplied.

    Args:
        size: side S of the mask, pixels.
        length: D, number of frequencies.

    Raises:
        ConfigError: `length` is not in [1, size * size].
    """

    rows: Float[Tensor, "R S"]
    columns: Float[Tensor, "Q S"]
    indices: Int[Tensor, "D"]

    def __init__(self, size: int = 128, length: int = 256) -> None:
        super().__init__()
        if size < 1 or not 1 <= length <= size * size:
            raise ConfigError(f"a DCT codec of {size} x {size} masks can have a length of 1 to {size * size}, got {length}.")
        self.size, self.length = size, length
        row, column = (
            torch.tensor(zigzag(size)[:length]).div(size, rounding_mode="floor"),
            torch.tensor(zigzag(size)[:length]) % size,
        )
        basis = dct_basis(size).float()
        width = min(-(-int(column.max() + 1) // 16) * 16, size)  # a few more than needed: multiples of 16 are multiplied faster
        self.register_buffer("rows", basis[: int(row.max()) + 1], persistent=False)
        self.register_buffer("columns", basis[:width], persistent=False)
        self.register_buffer("indices", row * width + column, persistent=False)

    def encode(self, masks: Float[Tensor, "n S S"]) -> Float[Tensor, "n D"]:
        """Return the first D frequencies of f = A m A^T for masks with values in [0, 1]."""
        return (self.rows @ masks @ self.columns.T).flatten(1).index_select(1, self.indices)

    def decode(self, codes: Float[Tensor, "n D"]) -> Float[Tensor, "n S S"]:
        """Return A^T f A, with zeros for all other frequencies; the caller chooses the threshold."""
        spectrum = codes.new_zeros(len(codes), len(self.rows) * len(self.columns))
        spectrum.index_copy_(1, self.indices, codes)
        return self.rows.T @ (spectrum.view(-1, len(self.rows), len(self.columns)) @ self.columns)
