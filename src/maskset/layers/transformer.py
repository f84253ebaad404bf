"""The deformable transformer: encoder, decoder layer, iterative box refinement and proposals (Deformable DETR, section 4)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from maskset.kernels.attention import Shapes, deformable_attention
from maskset.layers.blocks import Layer, cell_grid, frequencies, sine_positions
from maskset.structures import SlotPredictions


@dataclass(frozen=True, eq=False)
class Memory:
    """The cells of all feature levels, level after level, row-major: S is the sum of all h * w.

    Attributes:
        cells: features.
        positions: encoding of each cell's place and level.
        padding: which cells are padding.
        shapes: height and width of each level.
        valid: width and height of the unpadded part of each level, as fractions of the level.
    """

    cells: Float[Tensor, "B S C"]
    positions: Float[Tensor, "B S C"]
    padding: Bool[Tensor, "B S"]
    shapes: Shapes
    valid: Float[Tensor, "B L 2"]

    def references(self, boxes: Float[Tensor, "B Q _"]) -> Float[Tensor, "B Q L _"]:
        """Return points or boxes given in fractions of the unpadded image as fractions of each padded level."""
        return boxes[:, :, None] * self.valid[:, None].repeat(1, 1, 1, boxes.shape[-1] // 2)


def flatten_levels(
    levels: Sequence[Float[Tensor, "B C _ _"]], paddings: Sequence[Bool[Tensor, "B _ _"]], level_embedding: Float[Tensor, "L C"]
) -> Memory:
    """Return feature levels as one sequence, with the sine encoding plus each level's embedding as positions."""
    width = levels[0].shape[1]
    positions = [sine_positions(padding, width) + embedding for padding, embedding in zip(paddings, level_embedding, strict=True)]
    valid = [torch.stack([(~padding[:, 0]).float().mean(1), (~padding[:, :, 0]).float().mean(1)], -1) for padding in paddings]
    cells = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], 1)
    return Memory(
        cells=cells,
        positions=torch.cat(positions, 1).to(cells.dtype),  # otherwise all layers would add in float32 under autocast
        padding=torch.cat([padding.flatten(1) for padding in paddings], 1),
        shapes=[(level.shape[2], level.shape[3]) for level in levels],
        valid=torch.stack(valid, 1),
    )


def cell_centers(memory: Memory) -> Float[Tensor, "B S 2"]:
    """Return the center of every cell, x and y as fractions of the unpadded level."""
    centers = []
    for level, (height, width) in enumerate(memory.shapes):
        valid = memory.valid[:, None, level] * memory.valid.new_tensor([width, height])
        centers.append(cell_grid(height, width, like=memory.valid) / valid)
    return torch.cat(centers, 1)


class DeformableAttention(nn.Module):
    """Attention in which each head of a query samples `points` locations of each level, predicted from the query.

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
        """Initialize as Deformable DETR does: point p of a head is p + 1 cells from the reference, in a direction per head."""
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
        """Return the projected weighted samples of each query.

        Args:
            query: content and position of each query.
            reference: for each level, a point (x, y) or a box (cx, cy, w, h), in fractions of the padded level.
            memory: cells of all levels.
            shapes: height and width of each level.
            padding: which cells are padding; their value is zero, including the bias of the projection.
        """
        batch, queries, _ = query.shape
        per_head = (batch, queries, self.heads, self.levels, self.points)
        value = self.value_projection(memory).masked_fill_(padding[..., None], 0.0)
        offsets = self.sampling_offsets(query).view(*per_head, 2).float()
        weights = self.attention_weights(query).view(*per_head[:3], -1).float().softmax(-1).view(per_head)
        if reference.shape[-1] == 2:
            # In rows of L * P * 2 numbers, since pairs are too short for vector instructions.
            cells = torch.tensor([(w, h) * self.points for h, w in shapes], device=query.device, dtype=offsets.dtype).flatten()
            centers = reference.repeat(1, 1, 1, self.points).flatten(2)[:, :, None]
            locations = torch.addcdiv(centers, offsets.flatten(3), cells).view(*per_head, 2)
        else:
            center, side = reference[:, :, None, :, None].split(2, -1)
            locations = center + offsets / self.points * side * 0.5
        value = value.view(batch, -1, self.heads, value.shape[-1] // self.heads)
        return self.output_projection(deformable_attention(value, shapes, locations, weights))


class FeedForward(nn.Module):
    """Two linear layers with ReLU between, dropout after each, a residual connection and a layer norm."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Float[Tensor, "B n C"]) -> Float[Tensor, "B n C"]:
        """Return the normalized sum of x and the output of the layers."""
        return self.norm(x + self.dropout(self.down(self.dropout(self.up(x).relu_()))))


class EncoderLayer(Layer):
    """Every cell attends to a few sampled points of every level, then passes a feed-forward network."""

    def __init__(self, width: int, heads: int, levels: int, points: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention = DeformableAttention(width, heads, levels, points)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, hidden, dropout)

    def forward(self, cells: Float[Tensor, "B S C"], memory: Memory, reference: Tensor) -> Float[Tensor, "B S C"]:
        """Return new features of every cell; `memory` gives positions, padding and shapes."""
        attended = self.attention(cells + memory.positions, reference, cells, memory.shapes, memory.padding)
        return self.feed_forward(self.norm(cells + self.dropout(attended)))


class Encoder(nn.Module):
    """A stack of encoder layers without a final norm."""

    def __init__(self, layers: int, width: int, heads: int, levels: int, points: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(width, heads, levels, points, hidden, dropout) for _ in range(layers))

    def forward(self, memory: Memory) -> Memory:
        """Return the memory with new features."""
        reference = memory.references(cell_centers(memory))
        cells = memory.cells
        for layer in self.layers:
            cells = layer(cells, memory, reference)
        return Memory(cells, memory.positions, memory.padding, memory.shapes, memory.valid)


class DecoderLayer(Layer):
    """Self-attention of the queries, deformable attention to the memory around their references, and a feed-forward network."""

    def __init__(self, width: int, heads: int, levels: int, points: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.self_attention = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)
        self.self_norm = nn.LayerNorm(width)
        self.cross_attention = DeformableAttention(width, heads, levels, points)
        self.cross_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, hidden, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        content: Float[Tensor, "B N C"],
        position: Float[Tensor, "B N C"],
        reference: Float[Tensor, "B N _"],
        memory: Memory,
    ) -> Float[Tensor, "B N C"]:
        """Return new content of every query.

        Args:
            content: of the queries.
            position: of the queries, added to the content in queries and keys, not in values.
            reference: a point (x, y) or box (cx, cy, w, h) of each query, in fractions of the unpadded image.
            memory: what the encoder returned.
        """
        query = content + position
        attended = self.self_attention(query, query, content, need_weights=False)[0]
        content = self.self_norm(content + self.dropout(attended))
        references = memory.references(reference)
        attended = self.cross_attention(content + position, references, memory.cells, memory.shapes, memory.padding)
        content = self.cross_norm(content + self.dropout(attended))
        return self.feed_forward(content)


def reset_transformer(*parts: nn.Module) -> None:
    """Initialize as Deformable DETR does: Xavier for matrices, zero attention biases, sampling points around the reference."""
    for module in (module for part in parts for module in part.modules()):
        for parameter in module.parameters(recurse=False):
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        if isinstance(module, nn.MultiheadAttention):
            nn.init.zeros_(module.in_proj_bias)
            nn.init.zeros_(module.out_proj.bias)
    for module in (module for part in parts for module in part.modules()):
        if isinstance(module, DeformableAttention):
            module.reset_parameters()


def inverse_sigmoid(x: Tensor) -> Tensor:
    """Return log(x / (1 - x)) with both parts at least 1e-5, so that 0 and 1 stay finite."""
    x = x.clamp(0, 1)
    return (x.clamp(min=1e-5) / (1 - x).clamp(min=1e-5)).log()


def refine(delta: Float[Tensor, "B N 4"], reference: Float[Tensor, "B N _"]) -> Float[Tensor, "B N 4"]:
    """Return boxes cx cy w h: the reference (a point or a box) plus `delta`, both before the sigmoid (appendix A.4)."""
    start = inverse_sigmoid(reference)
    if start.shape[-1] == 2:  # a point has no size: the delta alone determines it
        start = torch.cat([start, torch.zeros_like(start)], -1)
    return (delta + start).sigmoid()


class Proposals(nn.Module):
    """The first of two stages: every cell of the memory proposes a box, and the best become queries (appendix A.4).

    Args:
        width: C.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.output = nn.Linear(width, width)
        self.output_norm = nn.LayerNorm(width)
        self.query = nn.Linear(4 * (width // 2), 2 * width)
        self.query_norm = nn.LayerNorm(2 * width)

    def forward(
        self, memory: Memory, class_head: nn.Module, box_head: nn.Module, count: int
    ) -> tuple[SlotPredictions, Float[Tensor, "B N 4"]]:
        """Return the predictions of the heads for every cell, and the boxes (before the sigmoid, detached) of the best cells.

        The best are the `count` cells with the highest score in class channel 0, which means any object here. The box of a head
        is relative to the cell's anchor.
        """
        features, anchors, _ = self.anchored(memory)
        logits = class_head(features)
        boxes = box_head(features).float() + anchors
        best = logits[..., 0].topk(min(count, logits.shape[1]), dim=1).indices
        proposals = boxes.gather(1, best[..., None].expand(-1, -1, 4)).detach()
        return SlotPredictions(logits, None, boxes.sigmoid()), proposals

    def anchored(self, memory: Memory) -> tuple[Float[Tensor, "B S C"], Float[Tensor, "B S 4"], Bool[Tensor, "B S"]]:
        """Return features for the heads, the anchor of each cell (cx cy w h, before the sigmoid), and which cells are valid.

        An anchor is the cell's center with a side of 0.05 * 2^level. A cell is valid if it is not padding and none of the four
        numbers is within 0.01 of 0 or 1. The others have zero features and an infinite anchor, whose sigmoid is 1.
        """
        centers = cell_centers(memory)
        sides = [0.05 * 2.0**level for level, (h, w) in enumerate(memory.shapes) for _ in range(h * w)]
        side = centers.new_tensor(sides)[None, :, None].expand(len(centers), -1, 2)
        anchors = torch.cat([centers, side], -1)
        valid = ((anchors > 0.01) & (anchors < 0.99)).all(-1) & ~memory.padding
        logits = (anchors / (1 - anchors)).log().masked_fill(~valid[..., None], torch.inf)
        features = self.output_norm(self.output(memory.cells.masked_fill(~valid[..., None], 0.0)))
        return features, logits, valid

    def queries(self, boxes: Float[Tensor, "B N 4"]) -> tuple[Float[Tensor, "B N C"], Float[Tensor, "B N C"]]:
        """Return position and content of the queries that start from boxes (cx cy w h before the sigmoid).

        Each coordinate gets C / 2 channels of sine encoding. The official code always uses 128, which works only for C = 256.
        """
        encoded = frequencies(boxes.sigmoid() * (2 * math.pi), self.width // 2).flatten(-2)
        position, content = self.query_norm(self.query(encoded.to(self.query.weight.dtype))).chunk(2, -1)
        return position, content
