"""Non-maximum suppression of masks: Matrix NMS (SOLOv2, NeurIPS 2020, section 3.3) and greedy NMS.

Masks must be sorted by score, highest first. Only masks of the same class are compared.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_MAX_CELLS = 2**24  # converted to float at a time


def mask_iou(masks: Bool[Tensor, "n h w"]) -> Float[Tensor, "n n"]:
    """Return the IoU of each pair of masks; 0 if one of them is empty."""
    flat = masks.flatten(1)
    overlap = torch.zeros(len(flat), len(flat), device=masks.device)
    for part in flat.split(max(1, _MAX_CELLS // max(1, len(flat))), dim=1):  # sums of 0 and 1, exact up to 2^24
        part = part.float()
        overlap += part @ part.T
    areas = overlap.diagonal()
    return overlap / (areas[:, None] + areas - overlap).clamp(min=1)


def matrix_nms(
    iou: Float[Tensor, "n n"], labels: Int[Tensor, "n"], kernel: Literal["gaussian", "linear"], sigma: float = 2.0
) -> Float[Tensor, "n"]:
    """Return the factor in [0, 1] that each score is multiplied by (eq. 3 to 5).

    decay_j = min over i < j of f(iou_ij) / f(max over k < i of iou_ki), where lower indices are higher scores.

    Args:
        iou: of each pair of masks.
        labels: classes.
        kernel: f, gaussian: exp(-sigma * iou^2); linear: 1 - iou.
        sigma: of the Gaussian.
    """
    if not len(labels):
        return iou.new_zeros(0)
    overlap = iou * _higher_scoring(labels)
    max_overlap = overlap.amax(0)[:, None]
    if kernel == "gaussian":
        decay = (sigma * (max_overlap.square() - overlap.square())).exp()
    else:
        # f(max_overlap) is 0 for the copy of a higher-scoring mask; that mask already suppresses whatever the copy would.
        decay = ((1 - overlap) / (1 - max_overlap)).masked_fill(max_overlap >= 1, 1)
    return decay.amin(0).clamp(max=1)


def greedy_nms(iou: Float[Tensor, "n n"], labels: Int[Tensor, "n"], threshold: float = 0.5) -> Bool[Tensor, "n"]:
    """Return which masks remain: those whose IoU with every remaining mask of a higher score is at most the threshold."""
    suppresses = ((iou > threshold) & _higher_scoring(labels)).cpu()
    remains = torch.ones(len(labels), dtype=torch.bool)
    for i in range(len(labels)):
        if remains[i]:
            remains &= ~suppresses[i]
    return remains.to(labels.device)


def _higher_scoring(labels: Int[Tensor, "n"]) -> Bool[Tensor, "n n"]:
    """Return for each pair (row, column) whether the row comes first and has the same class."""
    return (labels[:, None] == labels).triu(1)
