"""Multi-scale deformable attention on a GPU: `attention_plain.by_grid_sample` and its gradient as Triton kernels.

A program computes some neighboring queries of one head of one image: the cells that they sample overlap and stay in the L1
cache, and each thread reads 16 bytes at a time. Programs of one image run side by side, so that its value stays in the L2 cache.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import no_type_check  # of kernels: their annotations are for Triton

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from maskset.kernels.attention_plain import Locations, Output, Shapes, Value, Weights

# How many numbers of the output a program computes (TILE), and with how many warps. With more than 16 numbers per thread
# Triton passes the positions of the samples through shared memory, and registers run out.
TILES = [
    triton.Config({"TILE": tile}, num_warps=warps, num_stages=1) for tile, warps in [(256, 1), (512, 1), (512, 2), (1024, 4)]
]
UNTUNED = TILES[0].all_kwargs()
MIN_TUNED_SIZE = 2**21  # numbers in the output; below, as for a decoder's queries, tuning costs more than it saves

PROPAGATE_NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
@no_type_check
def _program_block(queries, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """Return a program's image (int64), head and first row of [B, Q, M], and which of its BLOCK queries exist."""
    program = tl.program_id(0)
    head = program % HEADS
    blocks = tl.cdiv(queries, BLOCK)
    start = program // HEADS % blocks * BLOCK
    image = (program // HEADS // blocks).to(tl.int64)
    return image, head, (image * queries + start) * HEADS + head, start + tl.arange(0, BLOCK) < queries


@triton.jit
@no_type_check
def _cell(fraction, extent):
    """Return the cell whose center precedes each position along one axis, and the distance from that center, in cells.

    Clamping does not change a sample that lies outside, and keeps far ones within the range of int32. NaN gives cell 0,
    which is a valid index, and a distance of NaN, so that the output is NaN.
    """
    position = tl.maximum(fraction * extent - 0.5, -2.0, propagate_nan=PROPAGATE_NAN)
    position = tl.minimum(position, extent + 1.0, propagate_nan=PROPAGATE_NAN)
    cell = tl.floor(tl.where(position == position, position, 0.0))
    return cell.to(tl.int32), position - cell


@triton.jit
@no_type_check
def _corner(left, top, dx, dy, height, wide, CORNER: tl.constexpr):
    """Return the cell of one of the four corners, whether it lies in the level, and its bilinear weights along x and y."""
    column = left + CORNER % 2
    row = top + CORNER // 2
    weight_x = dx if CORNER % 2 == 1 else 1.0 - dx
    weight_y = dy if CORNER // 2 == 1 else 1.0 - dy
    # One comparison checks both ends: a negative number is a large unsigned one.
    inside = (column.to(tl.uint32) < wide.to(tl.uint32)) & (row.to(tl.uint32) < height.to(tl.uint32))
    return row * wide + column, inside, weight_x, weight_y


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
    PADDED: tl.constexpr,  # the smallest power of two that is at least D
    DTYPE: tl.constexpr,  # of sums
    INDEX: tl.constexpr,  # integer type of an index into one image's value
    TILE: tl.constexpr,
):
    BLOCK: tl.constexpr = (TILE + PADDED - 1) // PADDED
    image, head, first_row, rows = _program_block(queries, HEADS, BLOCK)
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
            left, dx = _cell(x, wide)
            top, dy = _cell(y, height)
            weight = tl.load(weights + sample, mask=rows, other=0.0).to(DTYPE)
            for corner in tl.static_range(4):
                cell, inside, weight_x, weight_y = _corner(left, top, dx, dy, height, wide, corner)
                pointers = value + ((first + cell).to(INDEX) * (HEADS * WIDTH))[:, None] + channel
                values = tl.load(pointers, mask=(rows & inside)[:, None] & (channel < WIDTH), other=0.0).to(DTYPE)
                total += (weight_x * (weight_y * weight))[:, None] * values
    pointers = out + first_row * WIDTH + query[:, None] * (HEADS * WIDTH) + channel
    tl.store(pointers, total, mask=rows[:, None] & (channel < WIDTH))


@triton.jit
@no_type_check
def _backward(
    grad,  # [B, Q, M, D]
    value,
    levels,
    locations,
    weights,
    grad_value,  # zeros; in units of 1 / `scale` unless that is None
    grad_locations,
    grad_weights,
    scale,  # None, or fixed-point units per 1: sums are then int64, and do not depend on their order
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
    image, head, first_row, rows = _program_block(queries, HEADS, BLOCK)
    value += image * cells * (HEADS * WIDTH) + head * WIDTH
    grad_value += image * cells * (HEADS * WIDTH) + head * WIDTH
    locations += first_row * (LEVELS * POINTS * 2)
    grad_locations += first_row * (LEVELS * POINTS * 2)
    weights += first_row * (LEVELS * POINTS)
    grad_weights += first_row * (LEVELS * POINTS)
    # Four numbers per thread also where 16 bytes hold eight: an atomic addition takes four, all of one thread.
    channel = tl.max_contiguous(tl.arange(0, PADDED), 4)[None, :]
    query = tl.arange(0, BLOCK)
    pair = tl.arange(0, 2)[None, :]
    pointers = grad + first_row * WIDTH + query[:, None] * (HEADS * WIDTH) + channel
    grad_row = tl.load(pointers, mask=rows[:, None] & (channel < WIDTH), other=0.0).to(DTYPE)
    for level in range(LEVELS):
        height, wide, first = tl.load(levels + 3 * level), tl.load(levels + 3 * level + 1), tl.load(levels + 3 * level + 2)
        for point in tl.static_range(POINTS):
            sample = query * (HEADS * LEVELS * POINTS) + level * POINTS + point
            x, y = tl.split(tl.load(locations + 2 * sample[:, None] + pair, mask=rows[:, None], other=0.0).to(DTYPE))
            left, dx = _cell(x, wide)
            top, dy = _cell(y, height)
            weight = tl.load(weights + sample, mask=rows, other=0.0).to(DTYPE)
            grad_weight = tl.zeros([BLOCK], DTYPE)
            grad_x = tl.zeros([BLOCK], DTYPE)
            grad_y = tl.zeros([BLOCK], DTYPE)
            for corner in tl.static_range(4):
                cell, inside, weight_x, weight_y = _corner(left, top, dx, dy, height, wide, corner)
                offsets = ((first + cell).to(INDEX) * (HEADS * WIDTH))[:, None] + channel
                mask = (rows & inside)[:, None] & (channel < WIDTH)
                along = tl.sum(grad_row * tl.load(value + offsets, mask=mask, other=0.0).to(DTYPE), 1)
                grad_weight += weight_x * weight_y * along
                grad_x += (2 * (corner % 2) - 1) * weight_y * along
                grad_y += (2 * (corner // 2) - 1) * weight_x * along
                part = (weight_x * (weight_y * weight))[:, None] * grad_row
                if scale is not None:
                    part *= tl.load(scale)
                    part = tl.where(part == part, part, 0.0).to(tl.int64)
                tl.atomic_add(grad_value + offsets, part, mask=mask, sem="relaxed")
            tl.store(grad_weights + sample, grad_weight, mask=rows)
            grad_location = tl.join(grad_x * weight * wide, grad_y * weight * height)
            tl.store(grad_locations + 2 * sample[:, None] + pair, grad_location, mask=rows[:, None])


def _tuned(kernel, reset_to_zero: list[str]):
    """Return the kernel with the fastest of `TILES` for its heads, width, levels and points; the choice is cached on disk."""
    key = ["HEADS", "WIDTH", "LEVELS", "POINTS"]
    return triton.autotune(TILES, key=key, reset_to_zero=reset_to_zero, cache_results=True)(kernel)


_tuned_forward = _tuned(_forward, [])
_tuned_backward = _tuned(_backward, ["grad_value"])


@lru_cache(maxsize=1024)
def _levels(shapes: tuple[tuple[int, int], ...], device: torch.device) -> Int[Tensor, "L 3"]:
    """Return height, width and first cell of each level on the device. Cached, so that the copy is made once, asynchronously."""
    rows, first = [], 0
    for height, wide in shapes:
        rows.append((height, wide, first))
        first += height * wide
    return torch.tensor(rows, dtype=torch.int32).view(-1, 3).to(device, non_blocking=True)


def _launch(kernel, tensors: Sequence[Tensor | None], value: Tensor, locations: Tensor, tile: dict[str, int]) -> None:
    """Run a kernel on its tensors, with the settings `tile` or, if that is empty, with those that tuning chooses."""
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


def forward(value: Value, shapes: Shapes, locations: Locations, weights: Weights) -> Output:
    """Return what `by_grid_sample` returns, in the dtype of `value`; sums are in float32.

    A location that is NaN makes its query's output NaN; one that is far away or infinite samples zeros.

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
    if out.numel() < MIN_TUNED_SIZE:
        _launch(_forward, tensors, value, locations, UNTUNED)
    else:
        _launch(_tuned_forward, tensors, value, locations, {})
    return out


def backward(
    grad: Float[Tensor, "B Q _"], value: Value, shapes: Shapes, locations: Locations, weights: Weights
) -> tuple[Value, Locations, Weights]:
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
    scale = _fixed_point_scale(grad, locations, weights) if fixed else None
    exact = torch.promote_types(value.dtype, torch.float32)
    grad_value = torch.zeros(value.shape, dtype=torch.int64 if fixed else exact, device=value.device)
    tensors = (grad, value.contiguous(), levels, locations, weights, grad_value, grad_locations, grad_weights, scale)
    if fixed or grad.numel() < MIN_TUNED_SIZE:  # another tile may add a row's channels in another order
        _launch(_backward, tensors, value, locations, UNTUNED)
    else:
        _launch(_tuned_backward, tensors, value, locations, {})
    if scale is not None:
        grad_value = grad_value.to(exact).div_(scale)
    return grad_value.to(value.dtype), grad_locations, grad_weights


def _fixed_point_scale(grad: Tensor, locations: Tensor, weights: Tensor) -> Float[Tensor, ""]:
    """Return the largest power of two by which gradients can be multiplied so that no sum in a cell overflows int64.

    It is 0 or NaN if a number is not finite. A sample adds to four different cells, with weights of at most 1, so a cell gets
    at most one part of each sample of its level. Nothing is read back from the device.
    """
    samples = locations.shape[1] * locations.shape[4]
    exact = torch.promote_types(grad.dtype, torch.float32)  # in float16 the product would overflow
    largest = grad.abs().amax().to(exact) * weights.abs().amax() * samples
    largest = torch.where(locations.amax().isnan(), torch.nan, largest).clamp(min=2.0**-60)  # the scale stays finite
    return 2.0**62 / (largest / torch.frexp(largest).mantissa)  # the power of two above it, exactly
