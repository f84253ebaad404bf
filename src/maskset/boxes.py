"""Box formats and overlaps. Corner boxes are x0 y0 x1 y1, center boxes cx cy w h, in pixels or fractions."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

Boxes = Float[Tensor, "... 4"]


def to_corners(boxes: Boxes) -> Boxes:
    """Return center boxes cx cy w h as corner boxes x0 y0 x1 y1."""
    center, size = boxes.split(2, dim=-1)
    return torch.cat([center - 0.5 * size, center + 0.5 * size], dim=-1)


def to_centers(boxes: Boxes) -> Boxes:
    """Return corner boxes x0 y0 x1 y1 as center boxes cx cy w h."""
    low, high = boxes.split(2, dim=-1)
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def area(boxes: Boxes) -> Float[Tensor, "..."]:
    """Return width times height of corner boxes; 0 for inverted ones."""
    low, high = boxes.split(2, dim=-1)
    return (high - low).clamp(min=0).prod(-1)


def iou(a: Boxes, b: Boxes) -> Float[Tensor, "..."]:
    """Return the IoU of corner boxes, element by element; shapes broadcast. It is 0 where neither box has an area."""
    overlap, union = _overlap_and_union(a, b, _sides(a), _sides(b))
    return overlap / union.clamp(min=torch.finfo(union.dtype).tiny)


def generalized_iou(a: Boxes, b: Boxes) -> Float[Tensor, "..."]:
    """Return the generalized IoU of corner boxes in [-1, 1], element by element; shapes broadcast.

    IoU minus the share of the smallest enclosing box that neither covers (Rezatofighi et al., CVPR 2019, algorithm 1).
    """
    sides, other_sides = _sides(a), _sides(b)
    overlap, union = _overlap_and_union(a, b, sides, other_sides)
    (left, top, right, bottom), (other_left, other_top, other_right, other_bottom) = sides, other_sides
    width = torch.maximum(right, other_right) - torch.minimum(left, other_left)
    height = torch.maximum(bottom, other_bottom) - torch.minimum(top, other_top)
    hull = width.clamp_(min=0) * height.clamp_(min=0)
    tiny = torch.finfo(union.dtype).tiny
    return overlap / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)


def _overlap_and_union(a: Boxes, b: Boxes, sides: Sequence[Tensor], other_sides: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    (left, top, right, bottom), (other_left, other_top, other_right, other_bottom) = sides, other_sides
    width = torch.minimum(right, other_right) - torch.maximum(left, other_left)
    height = torch.minimum(bottom, other_bottom) - torch.maximum(top, other_top)
    overlap = width.clamp_(min=0) * height.clamp_(min=0)
    return overlap, area(a) + area(b) - overlap


def clip(boxes: Boxes, size: tuple[int, int]) -> Boxes:
    """Return corner boxes in pixels clipped to an image of `size` (height, width)."""
    return torch.minimum(boxes.clamp(min=0), scale_of(size, boxes))


def fractions(boxes: Boxes, size: Sequence[int]) -> Boxes:
    """Return corner boxes in pixels as cx cy w h in fractions of an image of `size` (height, width)."""
    return to_centers(boxes) / scale_of(size, boxes)


def scale_of(size: Sequence[int], like: Tensor) -> Float[Tensor, "4"]:
    """Return width, height, width, height: the factors between fractions of an image of `size` (height, width) and pixels."""
    height, width = size
    return like.new_tensor([width, height, width, height])


def _sides(boxes: Boxes) -> Sequence[Tensor]:
    """Return left, top, right and bottom of corner boxes, each contiguous, which allows vector instructions."""
    return boxes.movedim(-1, 0).contiguous().unbind()
