"""Duplicates among masks: Matrix NMS (SOLOv2, NeurIPS 2020, section 3.3) and greedy suppression.

All functions take pairs of mask and class sorted by score, best first, and compare those of the same class only.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_CELLS = 2**24  # of masks that are turned to numbers at a time


def mask_iou(masks: Bool[Tensor, "n h w"]) -> Float[Tensor, "n n"]:
    """Return the IoU of every two masks; 0 where one is empty."""
    flat = masks.flatten(1)
    overlap = torch.zeros(len(flat), len(flat), device=masks.device)
    for part in flat.split(max(1, _CELLS // max(1, len(flat))), dim=1):  # sums of 0 and 1, exact up to 2^24
        part = part.float()
        overlap += part @ part.T
    areas = overlap.diagonal()
    return overlap / (areas[:, None] + areas - overlap).clamp(min=1)


def matrix_nms(
    iou: Float[Tensor, "n n"], labels: Int[Tensor, "n"], kernel: Literal["gaussian", "linear"], sigma: float = 2.0
) -> Float[Tensor, "n"]:
    """Return what each score is multiplied by, between 0 and 1 (eq. 3 to 5).

    A mask j loses by each better mask i: by f(iou of both), divided by what i itself has lost at the most, f(greatest iou of i
    with a better one); the least of these counts.

    Args:
        iou: of every two masks.
        labels: classes.
        kernel: f, gaussian: exp(-sigma * iou^2); linear: 1 - iou.
        sigma: of the Gaussian.
    """
    if not len(labels):
        return iou.new_zeros(0)
    overlap = iou * _better(labels)
    most = overlap.amax(0)[:, None]
    if kernel == "gaussian":
        decay = (sigma * (most.square() - overlap.square())).exp()
    else:
        # A mask that equals a better one takes nothing from a third: the better one takes that already.
        decay = ((1 - overlap) / (1 - most)).masked_fill(most >= 1, 1)
    return decay.amin(0).clamp(max=1)


def greedy_nms(iou: Float[Tensor, "n n"], labels: Int[Tensor, "n"], threshold: float = 0.5) -> Bool[Tensor, "n"]:
    """Return which masks are kept: those that overlap no better one that is kept by more than the threshold."""
    suppresses = ((iou > threshold) & _better(labels)).cpu()
    kept = torch.ones(len(labels), dtype=torch.bool)
    for i in range(len(labels)):
        if kept[i]:
            kept &= ~suppresses[i]
    return kept.to(labels.device)


def _better(labels: Int[Tensor, "n"]) -> Bool[Tensor, "n n"]:
    """Return for each row whether it comes before the column and has its class."""
    return (labels[:, None] == labels).triu(1)
