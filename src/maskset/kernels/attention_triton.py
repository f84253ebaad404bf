"""Multi-scale deformable attention on a GPU: `plain.by_samples` and its gradient as Triton kernels.

A program takes some neighboring queries of one head of one image, so that what they see overlaps and stays in the nearest
cache, and each lane reads 16 bytes at a time. Programs of one image run side by side: its value stays in the cache behind.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import no_type_check  # of kernels: their annotations speak to Triton

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from maskset.kernels.attention_plain import Shapes

# How many numbers of the output a program computes (TILE), and by how many warps. With more than 16 numbers for each lane
# Triton passes the places of the samples through shared memory, and registers run out.
TILES = [
    triton.Config({"TILE": tile}, num_warps=warps, num_stages=1) for tile, warps in [(256, 1), (512, 1), (512, 2), (1024, 4)]
]
UNTUNED = TILES[0].all_kwargs()
WORTH_TUNING = 2**21  # numbers in the output; below, as for a decoder's queries, tuning costs more than it can win

EVERY_NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
@no_type_check
def _programs_share(queries, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """Return image (int64), head, the number of its first row among [B, Q, M], and which of its BLOCK queries there are."""
    program = tl.program_id(0)
    head = program % HEADS
    blocks = tl.cdiv(queries, BLOCK)
    start = program // HEADS % blocks * BLOCK
    image = (program // HEADS // blocks).to(tl.int64)
    return image, head, (image * queries + start) * HEADS + head, start + tl.arange(0, BLOCK) < queries


@triton.jit
@no_type_check
def _cell(fraction, extent):
    """Return the cell whose center is the last before each place along one axis, and how far behind that center the place is.

    Clamping does not change a sample that lies outside, and keeps far ones within the range of int32. The share of NaN is
    NaN, so the output is; its cell is 0, since NaN must not become an index.
    """
    place = tl.maximum(fraction * extent - 0.5, -2.0, propagate_nan=EVERY_NAN)
    place = tl.minimum(place, extent + 1.0, propagate_nan=EVERY_NAN)
    cell = tl.floor(tl.where(place == place, place, 0.0))
    return cell.to(tl.int32), place - cell


@triton.jit
@no_type_check
def _corner(left, top, share_right, share_below, height, wide, CORNER: tl.constexpr):
    """Return a corner's cell within the level, whether it lies in the level, and its shares along x and along y."""
    column = left + CORNER % 2
    row = top + CORNER // 2
    share_x = share_right if CORNER % 2 == 1 else 1.0 - share_right
    share_y = share_below if CORNER // 2 == 1 else 1.0 - share_below
    # One comparison for both ends: a negative number without its sign is a large one.
    inside = (column.to(tl.uint32) < wide.to(tl.uint32)) & (row.to(tl.uint32) < height.to(tl.uint32))
    return row * wide + column, inside, share_x, share_y


@triton.jit
@no_type_check
def _forward(
    value,  # [B, S, M, D]
    levels,  # [L, 3]: height, width, first cell
    locations,  # [B, Q, M, L, P, 2]
    weights,  # [B, Q, M, L, P]
    out,  # [B, Q, M, D]
    cells,  # S
    queries,  # Q
    HEADS: tl.constexpr,  # M
    WIDTH: tl.constexpr,  # D
    LEVELS: tl.constexpr,  # L
    POINTS: tl.constexpr,  # P
    PADDED: tl.constexpr,  # the power of two from D on
    DTYPE: tl.constexpr,  # of sums
    INDEX: tl.constexpr,  # the integer that counts the numbers of one image's value
    TILE: tl.constexpr,
):
    BLOCK: tl.constexpr = (TILE + PADDED - 1) // PADDED
    image, head, first_row, rows = _programs_share(queries, HEADS, BLOCK)
    value += image * cells * (HEADS * WIDTH) + head * WIDTH
    locations += first_row * (LEVELS * POINTS * 2)
    weights += first_row * (LEVELS * POINTS)
    channel = tl.arange(0, PADDED)[None, :]
    query = tl.arange(0, BLOCK)
    pair = tl.arange(0, 2)[None, :]
    total = tl.zeros([BLOCK, PADDED], DTYPE)
    for level in range(LEVELS):
        height, wide, first = tl.load(levels + 3 * level), tl.load(levels + 3 * level + 1), tl.load(levels + 3 * level + 2)
        for point in tl.static_range(POINTS):
            sample = query * (HEADS * LEVELS * POINTS) + level * POINTS + point
            x, y = tl.split(tl.load(locations + 2 * sample[:, None] + pair, mask=rows[:, None], other=0.0).to(DTYPE))
            left, share_right = _cell(x, wide)
            top, share_below = _cell(y, height)
            weight = tl.load(weights + sample, mask=rows, other=0.0).to(DTYPE)
            for corner in tl.static_range(4):
                cell, inside, share_x, share_y = _corner(left, top, share_right, share_below, height, wide, corner)
                places = value + ((first + cell).to(INDEX) * (HEADS * WIDTH))[:, None] + channel
                values = tl.load(places, mask=(rows & inside)[:, None] & (channel < WIDTH), other=0.0).to(DTYPE)
                total += (share_x * (share_y * weight))[:, None] * values
    places = out + first_row * WIDTH + query[:, None] * (HEADS * WIDTH) + channel
    tl.store(places, total, mask=rows[:, None] & (channel < WIDTH))


@triton.jit
@no_type_check
def _backward(
    grad,  # [B, Q, M, D]
    value,
    levels,
    locations,
    weights,
    grad_value,  # zeros; what `scale` makes of the gradient where there is one
    grad_locations,
    grad_weights,
    scale,  # None, or units in one: sums are then of whole units in int64, which do not depend on their order
    cells,
    queries,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    PADDED: tl.constexpr,
    DTYPE: tl.constexpr,
    INDEX: tl.constexpr,
    TILE: tl.constexpr,
):
    BLOCK: tl.constexpr = (TILE + PADDED - 1) // PADDED
    image, head, first_row, rows = _programs_share(queries, HEADS, BLOCK)
    value += image * cells * (HEADS * WIDTH) + head * WIDTH
    grad_value += image * cells * (HEADS * WIDTH) + head * WIDTH
    locations += first_row * (LEVELS * POINTS * 2)
    grad_locations += first_row * (LEVELS * POINTS * 2)
    weights += first_row * (LEVELS * POINTS)
    grad_weights += first_row * (LEVELS * POINTS)
    # Four numbers for each lane also where 16 bytes hold eight: an atomic addition takes four, and of the same lane.
    channel = tl.max_contiguous(tl.arange(0, PADDED), 4)[None, :]
    query = tl.arange(0, BLOCK)
    pair = tl.arange(0, 2)[None, :]
    places = grad + first_row * WIDTH + query[:, None] * (HEADS * WIDTH) + channel
    grad_row = tl.load(places, mask=rows[:, None] & (channel < WIDTH), other=0.0).to(DTYPE)
    for level in range(LEVELS):
        height, wide, first = tl.load(levels + 3 * level), tl.load(levels + 3 * level + 1), tl.load(levels + 3 * level + 2)
        for point in tl.static_range(POINTS):
            sample = query * (HEADS * LEVELS * POINTS) + level * POINTS + point
            x, y = tl.split(tl.load(locations + 2 * sample[:, None] + pair, mask=rows[:, None], other=0.0).to(DTYPE))
            left, share_right = _cell(x, wide)
            top, share_below = _cell(y, height)
            weight = tl.load(weights + sample, mask=rows, other=0.0).to(DTYPE)
            grad_weight = tl.zeros([BLOCK], DTYPE)
            grad_x = tl.zeros([BLOCK], DTYPE)
            grad_y = tl.zeros([BLOCK], DTYPE)
            for corner in tl.static_range(4):
                cell, inside, share_x, share_y = _corner(left, top, share_right, share_below, height, wide, corner)
                offsets = ((first + cell).to(INDEX) * (HEADS * WIDTH))[:, None] + channel
                mask = (rows & inside)[:, None] & (channel < WIDTH)
                along = tl.sum(grad_row * tl.load(value + offsets, mask=mask, other=0.0).to(DTYPE), 1)
                grad_weight += share_x * share_y * along
                grad_x += (2 * (corner % 2) - 1) * share_y * along
                grad_y += (2 * (corner // 2) - 1) * share_x * along
                part = (share_x * (share_y * weight))[:, None] * grad_row
                if scale is not None:
                    part *= tl.load(scale)
                    part = tl.where(part == part, part, 0.0).to(tl.int64)
                tl.atomic_add(grad_value + offsets, part, mask=mask, sem="relaxed")
            tl.store(grad_weights + sample, grad_weight, mask=rows)
            grad_place = tl.join(grad_x * weight * wide, grad_y * weight * height)
            tl.store(grad_locations + 2 * sample[:, None] + pair, grad_place, mask=rows[:, None])


def _tuned(kernel, reset_to_zero: list[str]):
    """Return the kernel with the fastest of `TILES`, whatever the size of the image; what was found is kept on disk."""
    key = ["HEADS", "WIDTH", "LEVELS", "POINTS"]
    return triton.autotune(TILES, key=key, reset_to_zero=reset_to_zero, cache_results=True)(kernel)


_tuned_forward = _tuned(_forward, [])
_tuned_backward = _tuned(_backward, ["grad_value"])


@lru_cache(maxsize=1024)
def _levels(shapes: tuple[tuple[int, int], ...], device: torch.device) -> Int[Tensor, "L 3"]:
    """Return height, width and first cell of each level; a copy on the device that does not wait for it, and only one."""
    rows, first = [], 0
    for height, wide in shapes:
        rows.append((height, wide, first))
        first += height * wide
    return torch.tensor(rows, dtype=torch.int32).view(-1, 3).to(device, non_blocking=True)


def _launch(kernel, tensors: Sequence[Tensor | None], value: Tensor, locations: Tensor, tile: dict[str, int]) -> None:
    """Run a kernel on its tensors, with `tile` or, where that is empty, with what tuning finds."""
    _, cells, heads, width = value.shape
    batch, queries, _, levels, points, _ = locations.shape
    padded = triton.next_power_of_2(width)

    def grid(settings: dict[str, int]) -> tuple[int]:
        return (batch * heads * triton.cdiv(queries, triton.cdiv(settings["TILE"], padded)),)

    with torch.cuda.device_of(value):
        kernel[grid](
            *tensors,
            cells,
            queries,
            HEADS=heads,
            WIDTH=width,
            LEVELS=levels,
            POINTS=points,
            PADDED=padded,
            DTYPE=tl.float64 if value.dtype == torch.float64 else tl.float32,
            INDEX=tl.int32 if cells * heads * width < 2**31 else tl.int64,
            enable_fp_fusion=True,
            **tile,
        )


def forward(
    value: Float[Tensor, "B S M D"],
    shapes: Shapes,
    locations: Float[Tensor, "B Q M L P 2"],
    weights: Float[Tensor, "B Q M L P"],
) -> Float[Tensor, "B Q M*D"]:
    """Return what `plain.by_samples` returns, in the dtype of `value`; sums are in float32.

    A location that is NaN makes its query's output NaN; one that is far away or infinite sees zeros.

    Args:
        value: the levels' cells, in float32, bfloat16, float16 or float64 (sums are then in float64).
        shapes: height and width of each level.
        locations: where to sample, x and y as fractions of the level.
        weights: of the samples.
    """
    batch, _, heads, width = value.shape
    out = value.new_empty(batch, locations.shape[1], heads * width)
    if value.numel() == 0 or locations.numel() == 0:
        return out.zero_()
    levels = _levels(tuple((h, w) for h, w in shapes), value.device)
    tensors = (value.contiguous(), levels, locations.contiguous(), weights.contiguous(), out)
    if out.numel() < WORTH_TUNING:
        _launch(_forward, tensors, value, locations, UNTUNED)
    else:
        _launch(_tuned_forward, tensors, value, locations, {})
    return out


def backward(
    grad: Float[Tensor, "B Q C"],
    value: Float[Tensor, "B S M D"],
    shapes: Shapes,
    locations: Float[Tensor, "B Q M L P 2"],
    weights: Float[Tensor, "B Q M L P"],
) -> tuple[Float[Tensor, "B S M D"], Float[Tensor, "B Q M L P 2"], Float[Tensor, "B Q M L P"]]:
    """Return the gradients of `value`, `locations` and `weights`, each in the dtype of its tensor; sums are in float32.

    Where torch asks for deterministic algorithms, the gradient of `value` is summed in fixed point and does not depend on
    the order of the additions; it is NaN if anything in `grad`, `locations` or `weights` is, or if `grad` or `weights` is
    infinite.

    Args:
        grad: of the output; C = M * D.
        value: as in `forward`.
        shapes: as in `forward`.
        locations: as in `forward`.
        weights: as in `forward`.
    """
    grad, locations, weights = grad.contiguous(), locations.contiguous(), weights.contiguous()
    grad_locations, grad_weights = torch.empty_like(locations), torch.empty_like(weights)
    if value.numel() == 0 or locations.numel() == 0:
        return torch.zeros_like(value), grad_locations.zero_(), grad_weights.zero_()
    levels = _levels(tuple((h, w) for h, w in shapes), value.device)
    fixed = torch.are_deterministic_algorithms_enabled()
    scale = _units_in_one(grad, locations, weights) if fixed else None
    exact = torch.promote_types(value.dtype, torch.float32)
    grad_value = torch.zeros(value.shape, dtype=torch.int64 if fixed else exact, device=value.device)
    tensors = (grad, value.contiguous(), levels, locations, weights, grad_value, grad_locations, grad_weights, scale)
    if fixed or grad.numel() < WORTH_TUNING:  # another tile may add a row's channels in another order
        _launch(_backward, tensors, value, locations, UNTUNED)
    else:
        _launch(_tuned_backward, tensors, value, locations, {})
    if scale is not None:
        grad_value = grad_value.to(exact).div_(scale)
    return grad_value.to(value.dtype), grad_locations, grad_weights


def _units_in_one(grad: Tensor, locations: Tensor, weights: Tensor) -> Float[Tensor, ""]:
    """Return the largest power of two of units with which no sum in a cell leaves int64; 0 or NaN if a number is not finite.

    A sample has four corners in four cells, none with a share of more than 1, so at most one part of each sample of a level
    meets in a cell. Nothing is read back from the device.
    """
    samples = locations.shape[1] * locations.shape[4]
    exact = torch.promote_types(grad.dtype, torch.float32)  # in float16 the product would leave what there is
    largest = grad.abs().amax().to(exact) * weights.abs().amax() * samples
    largest = torch.where(locations.amax().isnan(), torch.nan, largest).clamp(min=2.0**-60)  # units in one stay finite
    return 2.0**62 / (largest / torch.frexp(largest).mantissa)  # the power of two above it, exactly
