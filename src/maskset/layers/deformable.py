"""Multi-scale deformable attention (Deformable DETR, section 4.1, eq. 3)."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

Shapes = Sequence[tuple[int, int]]  # height and width of each level


def deformable_attention_reference(
    value: Float[Tensor, "B S M D"],
    shapes: Shapes,
    locations: Float[Tensor, "B Q M L P 2"],
    weights: Float[Tensor, "B Q M L P"],
) -> Float[Tensor, "B Q M*D"]:
    """Return the weighted sum of P bilinear samples of each of L levels, for every query and head: the readable form.

    Args:
        value: the levels' cells, level after level, row-major, for each of M heads; S is the sum of all h * w.
        shapes: height and width of each level.
        locations: where to sample, x and y as fractions of the level; zero outside of [0, 1].
        weights: of the samples.
    """
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


def deformable_attention(
    value: Float[Tensor, "B S M D"],
    shapes: Shapes,
    locations: Float[Tensor, "B Q M L P 2"],
    weights: Float[Tensor, "B Q M L P"],
) -> Float[Tensor, "B Q M*D"]:
    """Return what `deformable_attention_reference` returns, in less time and memory.

    A bilinear sample is a weighted sum of four cells, so a query's output is one weighted sum of 4 * L * P rows of `value`
    without copies of the rows: `embedding_bag`.
    """
    batch, total, heads, width = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    rows, factors, first = [], [], 0
    image = torch.arange(batch, device=value.device, dtype=torch.int32).view(-1, 1, 1, 1) * total
    head = torch.arange(heads, device=value.device, dtype=torch.int32).view(1, 1, -1, 1)
    for level, (height, wide) in enumerate(shapes):
        # Clamping does not change a sample that lies outside, and keeps far ones within the range of int32.
        x = (locations[:, :, :, level, :, 0] * wide - 0.5).clamp(-2, wide + 1)
        y = (locations[:, :, :, level, :, 1] * height - 0.5).clamp(-2, height + 1)
        left, top = x.detach().nan_to_num().floor(), y.detach().nan_to_num().floor()  # NaN must not become an index
        for corner_x, share_x in ((left, left + 1 - x), (left + 1, x - left)):
            for corner_y, share_y in ((top, top + 1 - y), (top + 1, y - top)):
                inside = (corner_x >= 0) & (corner_x < wide) & (corner_y >= 0) & (corner_y < height)
                cell = corner_y.clamp(0, height - 1).int() * wide + corner_x.clamp(0, wide - 1).int()
                rows.append((image + first + cell) * heads + head)
                factors.append(share_x * share_y * weights[:, :, :, level] * inside)
        first += height * wide
    bag = 4 * len(shapes) * points
    sums = F.embedding_bag(
        torch.stack(rows, -1).view(-1, bag),
        value.reshape(-1, width),
        mode="sum",
        per_sample_weights=torch.stack(factors, -1).view(-1, bag),
    )
    return sums.view(batch, queries, heads * width)


class DeformableAttention(nn.Module):
    """Each query looks at `points` places of each level around its reference, for each head; the places depend on the query.

    Args:
        width: C, of queries and values.
        heads: attention heads.
        levels: feature levels.
        points: sampling points of a head in a level.
    """

    def __init__(self, width: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(width, heads * levels * points * 2)
        self.attention_weights = nn.Linear(width, heads * levels * points)
        self.value_projection = nn.Linear(width, width)
        self.output_projection = nn.Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the start of Deformable DETR: point p of a head looks p + 1 cells away in that head's direction, all alike."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angle = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        distance = torch.arange(1, self.points + 1, dtype=torch.float32)
        offsets = direction[:, None, None, :] * distance[None, None, :, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.levels, -1, -1).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_projection, self.output_projection):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Float[Tensor, "B Q C"],
        reference: Float[Tensor, "B Q L _"],
        memory: Float[Tensor, "B S C"],
        shapes: Shapes,
        padding: Bool[Tensor, "B S"],
    ) -> Float[Tensor, "B Q C"]:
        """Return what each query saw.

        Args:
            query: content and position of each query.
            reference: for each level, a point (x, y) or a box (cx, cy, w, h), in fractions of the padded level.
            memory: cells of all levels.
            shapes: height and width of each level.
            padding: which cells are padding; their value is zero (also the projection's bias).
        """
        batch, queries, _ = query.shape
        per_head = (batch, queries, self.heads, self.levels, self.points)
        value = self.value_projection(memory).masked_fill(padding[..., None], 0.0)
        offsets = self.sampling_offsets(query).view(*per_head, 2).float()
        weights = self.attention_weights(query).view(*per_head[:3], -1).float().softmax(-1).view(per_head)
        centre = reference[:, :, None, :, None, :2]
        if reference.shape[-1] == 2:
            cells = torch.tensor([(w, h) for h, w in shapes], device=query.device, dtype=offsets.dtype)
            locations = centre + offsets / cells[:, None, :]
        else:
            locations = centre + offsets / self.points * reference[:, :, None, :, None, 2:] * 0.5
        value = value.view(batch, -1, self.heads, value.shape[-1] // self.heads)
        seen = deformable_attention(value.float(), shapes, locations, weights)  # low precision would move the samples
        return self.output_projection(seen.to(value.dtype))
