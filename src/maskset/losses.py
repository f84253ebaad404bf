"""Losses. Each returns sums that the caller divides: what to divide by is the paper's business."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from maskset import boxes as box_ops


def focal_loss(
    logits: Float[Tensor, "*n"], targets: Float[Tensor, "*n"], alpha: float = 0.25, gamma: float = 2.0
) -> Float[Tensor, "*n"]:
    """Return the sigmoid focal loss of every logit (Lin et al., ICCV 2017, eq. 5); targets are 0 or 1."""
    probability = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    miss = probability * (1 - targets) + (1 - probability) * targets
    return (alpha * targets + (1 - alpha) * (1 - targets)) * miss**gamma * entropy


def l1_loss(boxes: Float[Tensor, "n 4"], targets: Float[Tensor, "n 4"]) -> Float[Tensor, "n"]:
    """Return the sum of absolute differences of each pair."""
    return (boxes - targets).abs().sum(-1)


def giou_loss(boxes: Float[Tensor, "n 4"], targets: Float[Tensor, "n 4"]) -> Float[Tensor, "n"]:
    """Return 1 - generalised IoU of each pair of boxes, given as cx cy w h."""
    return 1 - box_ops.generalised_iou(box_ops.to_corners(boxes), box_ops.to_corners(targets))


def dice_loss(probabilities: Float[Tensor, "n *s"], targets: Float[Tensor, "n *s"]) -> Float[Tensor, "n"]:
    """Return 1 - (2 overlap + 1) / (sum of both + 1) of each pair of soft masks (Milletari et al., 3DV 2016; smoothed by 1)."""
    p, t = probabilities.flatten(1), targets.flatten(1)
    return 1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)


def sum_by_layer(values: Float[Tensor, "M"], layer: Tensor, layers: int) -> Float[Tensor, "L"]:
    """Return the sum of the values of each layer, given which layer each value belongs to."""
    return values.new_zeros(layers).index_add(0, layer, values)
