"""Task-aligned assignment (TOOD; Feng et al., ICCV 2021, section 3.2): which slots learn from which object.

Each object chooses the slots, one or several, whose class scores and boxes fit it best. Unlike in the matching of
`maskset.detection`, objects choose independently of each other, so there is no total cost and no copy to the host.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from maskset import boxes as box_ops
from maskset.detection import pad

_MARGIN = 4  # pixels around an object's box in which the center of a slot's box may lie: small boxes contain few centers


@dataclass(frozen=True)
class Assignment:
    """Which slots learn from each object of a batch; images are padded to the greatest number T of objects.

    Attributes:
        slots: indices of the k slots that each object has chosen, the assigned ones first, the best of them first.
        targets: the class probability that they should have; 0 if another object got the slot, and for padding.
    """

    slots: Int[Tensor, "B T k"]
    targets: Float[Tensor, "B T k"]


@dataclass(frozen=True)
class Fit:
    """How well the boxes of the N slots of an image fit its T objects.

    Attributes:
        iou: of each object and slot.
        allowed: whether the slot may learn from the object.
        nearness: a tiny number, greater where the centers are nearer: it decides among slots without overlap.
    """

    iou: Float[Tensor, "T N"]
    allowed: Bool[Tensor, "T N"]
    nearness: Float[Tensor, "T N"]


@torch.no_grad()
def fit(slots: Float[Tensor, "N 4"], objects: Float[Tensor, "T 4"], usable: Bool[Tensor, "N"]) -> Fit:
    """Return how well slots fit objects. A slot may learn from objects whose box contains the center of its own, or nearly does.

    Args:
        slots: boxes x0 y0 x1 y1, pixels.
        objects: boxes x0 y0 x1 y1, pixels.
        usable: whether a slot may learn from any object.
    """
    x, y = ((slots[:, :2] + slots[:, 2:]) / 2).T
    left, top, right, bottom = objects.T[..., None]
    inside = (x > left - _MARGIN) & (x < right + _MARGIN) & (y > top - _MARGIN) & (y < bottom + _MARGIN)
    nearness = 1e-9 / (1 + (x - (left + right) / 2).abs() + (y - (top + bottom) / 2).abs())
    return Fit(box_ops.iou(objects[:, None], slots), inside & usable, nearness)


@torch.no_grad()
def assign(
    logits: Float[Tensor, "B N K"],
    fits: Sequence[Fit],
    labels: Sequence[Int[Tensor, "_"]],
    count: int,
    powers: tuple[float, float],
    min_target: float,
) -> Assignment:
    """Return the `count` slots of each object with the greatest score^a IoU^b (TOOD, eq. 3); at most N.

    Of several objects that choose a slot, the one with the greatest product gets it; the others then have fewer slots, perhaps
    none. The target is the IoU, but at least `min_target`: in the beginning no IoU is large, and without a minimum the scores
    would not rise.

    Args:
        logits: of all slots, before the sigmoid.
        fits: of the slots and objects of each image.
        labels: class of each object, for each image.
        count: k.
        powers: a and b.
        min_target: minimum target of an assigned slot.
    """
    slots, targets = [], []
    for image_logits, image_fit, label in zip(logits.float(), fits, labels, strict=True):
        quality = image_logits.T[label].sigmoid() ** powers[0] * image_fit.iou ** powers[1]  # [T N]
        quality = (quality + image_fit.nearness) * image_fit.allowed
        best, index = quality.topk(min(count, quality.shape[1]), 1)
        highest = quality.new_zeros(quality.shape[1]).scatter_reduce(0, index.flatten(), best.flatten(), "amax")
        won = (best > 0) & (best == highest[index])
        order = won.long().argsort(dim=1, descending=True, stable=True)
        slots.append(index.gather(1, order))
        target = image_fit.iou.gather(1, index).clamp(min=min_target) * won
        targets.append(target.gather(1, order))
    return Assignment(pad(slots), pad(targets))
