"""Multi-scale deformable attention (Deformable DETR, section 4.1, eq. 3)."""

import importlib.util
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from maskset.errors import AttentionError
from maskset.kernels import library
from maskset.kernels.attention import fused
from maskset.kernels.attention_plain import Locations, Output, Shapes, Value, Weights, by_embedding_bag, by_gather, by_grid_sample
from maskset.kernels.self_check import triton_failure

ATTENTION_ENV = "MASKSET_ATTENTION"  # environment variable that names the implementation; the default is the fastest available
PLAIN = {"reference": by_grid_sample, "bag": by_embedding_bag, "gather": by_gather}
FUSED = {"c": "cpu", "triton": "cuda"}  # and the device type that each supports
_GPU = torch.device("cuda")
_TRITON = importlib.util.find_spec("triton") is not None


def deformable_attention(value: Value, shapes: Shapes, locations: Locations, weights: Weights) -> Output:
    """Return the weighted sum of P bilinear samples of each of L levels, for every query and head, in the type of `value`.

    All implementations give the same but for rounding. A location that is NaN gives NaN.

    Args:
        value: the levels' cells, level after level, row-major, for each of M heads; S is the sum of all h * w.
        shapes: height and width of each level.
        locations: where to sample, x and y as fractions of the level; zero outside of [0, 1]. Float32, or as `value`.
        weights: of the samples.

    Raises:
        AttentionError: MASKSET_ATTENTION names an implementation that is not available here.
    """
    name = os.environ.get(ATTENTION_ENV) or _fastest(value)
    if name in PLAIN:
        return PLAIN[name](value.to(locations.dtype), shapes, locations, weights).to(value.dtype)
    _check(name, value)
    return fused(value, [side for shape in shapes for side in shape], locations, weights)


def implementations() -> dict[str, str | None]:
    """Return every implementation by name, with the reason why it is unavailable on this machine, or None."""
    return {name: _unavailable_reason(name) for name in (*FUSED, *PLAIN)}


@contextmanager
def using(name: str) -> Iterator[None]:
    """Use one implementation of deformable attention inside a `with` block, in all threads."""
    before = os.environ.get(ATTENTION_ENV)
    os.environ[ATTENTION_ENV] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[ATTENTION_ENV]
        else:
            os.environ[ATTENTION_ENV] = before


def _fastest(value: Tensor) -> str:
    if torch.compiler.is_exporting():
        return "gather"
    for name, device in FUSED.items():
        if value.device.type == device and _unavailable_reason(name, value.device) is None:
            return name
    return "bag" if value.shape[3] >= 8 else "reference"  # for narrow rows, listing the rows costs more than it saves


def _unavailable_reason(name: str, device: torch.device | None = None) -> str | None:
    if name == "c":
        return library.unavailable_reason()
    return _no_triton_reason(device) if name == "triton" else None


def _no_triton_reason(device: torch.device | None) -> str | None:
    if not torch.cuda.is_available():
        return "there is no GPU"
    if not _TRITON:
        return "Triton is not installed: `pip install triton`"
    return triton_failure(device or _GPU)


def _check(name: str, value: Tensor) -> None:
    """Raise an AttentionError if a fused implementation does not exist or is unavailable for this machine or tensor."""
    if name not in FUSED:
        raise AttentionError(f"there is no implementation {name!r} ({ATTENTION_ENV}); there are {', '.join([*FUSED, *PLAIN])}.")
    why = _unavailable_reason(name)
    if why is None and value.device.type != FUSED[name]:
        why = f"it is for tensors on {FUSED[name]}, these are on {value.device.type}"
    if why is not None:
        raise AttentionError(f"{ATTENTION_ENV}={name} cannot be used: {why}. Unset it to use the fastest available one.")


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
        """Initialize as Deformable DETR does: point p of a head lies p + 1 cells away in the direction of that head."""
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
            padding: which cells are padding; their value is zero (also the projection's bias).
        """
        batch, queries, _ = query.shape
        per_head = (batch, queries, self.heads, self.levels, self.points)
        value = self.value_projection(memory).masked_fill_(padding[..., None], 0.0)
        offsets = self.sampling_offsets(query).view(*per_head, 2).float()
        weights = self.attention_weights(query).view(*per_head[:3], -1).float().softmax(-1).view(per_head)
        if reference.shape[-1] == 2:
            # In rows of L * P * 2 numbers: pairs are too short for vector instructions.
            cells = torch.tensor([(w, h) * self.points for h, w in shapes], device=query.device, dtype=offsets.dtype).flatten()
            centers = reference.repeat(1, 1, 1, self.points).flatten(2)[:, :, None]
            locations = torch.addcdiv(centers, offsets.flatten(3), cells).view(*per_head, 2)
        else:
            center, side = reference[:, :, None, :, None].split(2, -1)
            locations = center + offsets / self.points * side * 0.5
        value = value.view(batch, -1, self.heads, value.shape[-1] // self.heads)
        return self.output_projection(deformable_attention(value, shapes, locations, weights))
