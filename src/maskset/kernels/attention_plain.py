"""Deformable attention in plain PyTorch: a readable version, a faster one and one for export. See `kernels.attention`.

Fast paths: attention.py (kernels/csrc/attention.c) on the CPU and attention_triton.py on a GPU.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int32
from torch import Tensor

Shapes = Sequence[tuple[int, int]]  # height and width of each level
Value = Float[Tensor, "B S M D"]  # the cells of all levels, level after level, row-major, for each of M heads
Locations = Float[Tensor, "B Q M L P 2"]  # of the samples, x and y as fractions of the level
Weights = Float[Tensor, "B Q M L P"]  # of the samples
Output = Float[Tensor, "B Q M*D"]


def by_grid_sample(value: Value, shapes: Shapes, locations: Locations, weights: Weights) -> Output:
    """Return the weighted sums of bilinear samples, level by level. This is the readable version."""
    batch, _, heads, width = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    total = value.new_zeros(batch * heads, width, queries)
    for level, (cells, (height, wide)) in enumerate(zip(value.split([h * w for h, w in shapes], dim=1), shapes, strict=True)):
        maps = cells.permute(0, 2, 3, 1).reshape(batch * heads, width, height, wide)
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)
        samples = F.grid_sample(maps, grid, padding_mode="zeros", align_corners=False)  # [B*M, D, Q, P]
        share = weights[:, :, :, level].transpose(1, 2).reshape(batch * heads, 1, queries, points)
        total = total + (samples * share).sum(-1)
    return total.view(batch, heads * width, queries).transpose(1, 2)


def by_embedding_bag(value: Value, shapes: Shapes, locations: Locations, weights: Weights) -> Output:
    """Return the same in less time and memory, as one weighted sum of 4 * L * P rows of `value` for each query and head.

    A bilinear sample is a weighted sum of four cells, and `embedding_bag` sums rows without copies of them.
    """
    batch, total, heads, width = value.shape
    cells, factors = corners(shapes, locations, weights)
    image = torch.arange(batch, device=value.device, dtype=torch.int32).view(-1, 1, 1, 1) * total
    head = torch.arange(heads, device=value.device, dtype=torch.int32).view(1, 1, -1, 1)
    rows = (image + cells) * heads + head
    sums = F.embedding_bag(
        rows.flatten(0, 2), value.reshape(-1, width), mode="sum", per_sample_weights=factors.flatten(0, 2).to(value.dtype)
    )
    return sums.view(batch, locations.shape[1], heads * width)


def by_gather(value: Value, shapes: Shapes, locations: Locations, weights: Weights) -> Output:
    """Return the same by copying rows and multiplying matrices. It is slow, but every ONNX runtime has both operations."""
    batch, _, heads, width = value.shape
    cells, factors = corners(shapes, locations, weights)
    queries, bag = cells.shape[1], cells.shape[3]
    index = cells.transpose(1, 2).reshape(batch, heads, queries * bag, 1).long().expand(-1, -1, -1, width)
    rows = value.transpose(1, 2).gather(2, index).view(batch, heads, queries, bag, width)
    sums = factors.transpose(1, 2)[:, :, :, None].to(value.dtype) @ rows  # [B M Q 1 D]
    return sums[:, :, :, 0].transpose(1, 2).reshape(batch, queries, heads * width)


def corners(
    shapes: Shapes, locations: Locations, weights: Weights
) -> tuple[Int32[Tensor, "B Q M 4*L*P"], Float[Tensor, "B Q M 4*L*P"]]:
    """Return the cells that each head of a query samples, the four around each location, and their weights."""
    cells, factors, first = [], [], 0
    for level, (height, wide) in enumerate(shapes):
        # Clamping does not change a sample that lies outside, and keeps far ones within the range of int32.
        x = (locations[:, :, :, level, :, 0] * wide - 0.5).clamp(-2, wide + 1)
        y = (locations[:, :, :, level, :, 1] * height - 0.5).clamp(-2, height + 1)
        left, top = x.detach().nan_to_num().floor(), y.detach().nan_to_num().floor()  # NaN must not become an index
        for corner_x, share_x in ((left, left + 1 - x), (left + 1, x - left)):
            for corner_y, share_y in ((top, top + 1 - y), (top + 1, y - top)):
                inside = (corner_x >= 0) & (corner_x < wide) & (corner_y >= 0) & (corner_y < height)
                cell = corner_y.clamp(0, height - 1).int() * wide + corner_x.clamp(0, wide - 1).int()
                cells.append(first + cell)
                factors.append(share_x * share_y * weights[:, :, :, level] * inside)
        first += height * wide
    return torch.stack(cells, -1).flatten(3), torch.stack(factors, -1).flatten(3)
