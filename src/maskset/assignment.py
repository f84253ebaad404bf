"""Task-aligned assignment (TOOD; Feng et al., ICCV 2021, section 3.2): which slots learn from which object.

Each object chooses the slots, one or several, whose class scores and boxes fit it best. Unlike in the matching of
`maskset.detection`, objects choose independently of each other, so there is no total cost and no copy to the host.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
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


@torch.no_grad()
def overlap(objects: Float[Tensor, "T 4"], slots: Float[Tensor, "N 4"]) -> Float[Tensor, "T N"]:
    """Return the IoU of each object and slot, but 0 where the center of the slot's box is far outside the object's box.

    Args:
        objects: boxes x0 y0 x1 y1, pixels.
        slots: boxes x0 y0 x1 y1, pixels.
    """
    x, y = ((slots[:, :2] + slots[:, 2:]) / 2).T
    left, top, right, bottom = objects.T[..., None]
    inside = (x > left - _MARGIN) & (x < right + _MARGIN) & (y > top - _MARGIN) & (y < bottom + _MARGIN)
    return box_ops.iou(objects[:, None], slots) * inside


@torch.no_grad()
def assign(
    logits: Float[Tensor, "B N K"],
    overlaps: Sequence[Float[Tensor, "_ N"]],
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
        overlaps: of the objects and slots of each image, from `overlap`; slots with 0 do not learn from the object.
        labels: class of each object, for each image.
        count: k.
        powers: a and b.
        min_target: minimum target of an assigned slot.
    """
    slots, targets = [], []
    for image_logits, iou, label in zip(logits.float(), overlaps, labels, strict=True):
        quality = image_logits.T[label].sigmoid() ** powers[0] * iou ** powers[1] * (iou > 0)  # [T N]
        best, index = quality.topk(min(count, quality.shape[1]), 1)
        highest = quality.new_zeros(quality.shape[1]).scatter_reduce(0, index.flatten(), best.flatten(), "amax")
        won = (best > 0) & (best == highest[index])
        order = won.long().argsort(dim=1, descending=True, stable=True)
        slots.append(index.gather(1, order))
        targets.append((iou.gather(1, index).clamp(min=min_target) * won).gather(1, order))
    return Assignment(pad(slots), pad(targets))
