"""Bipartite matching of slots and objects: costs for all layers and images at once, one copy to the host, scipy.

Objects of a batch are padded to the greatest count T of an image, so a cost is one tensor [L, B, N, T].
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from maskset import boxes as box_ops
from maskset.errors import MatchingError


@dataclass(frozen=True)
class Matches:
    """The matched pairs of all layers and images, layer by layer and image by image; each attribute is Int[M].

    Attributes:
        layer: index of the layer.
        image: index of the image in the batch.
        slot: index of the slot in the image.
        object: index of the object in the image.
        counts: number of pairs of each image, the same in every layer; the other attributes can be split by it.
    """

    layer: Int[Tensor, "M"]
    image: Int[Tensor, "M"]
    slot: Int[Tensor, "M"]
    object: Int[Tensor, "M"]
    counts: Sequence[int]

    def __len__(self) -> int:
        return len(self.layer)


def pad(parts: Sequence[Tensor]) -> Tensor:
    """Return tensors [T_i, ...] of the images of a batch as one tensor [B, max T_i, ...], padded with zeros."""
    longest = max(len(part) for part in parts)
    padded = parts[0].new_zeros(len(parts), longest, *parts[0].shape[1:])
    for row, part in zip(padded, parts, strict=True):
        row[: len(part)] = part
    return padded


def focal_cost(
    logits: Float[Tensor, "L B N K"],
    labels: Int[Tensor, "B T"],
    alpha: float = 0.25,
    gamma: float = 2.0,
    least: float = 1e-8,
) -> Float[Tensor, "L B N T"]:
    """Return the change of the focal loss if the slot predicted the object's class (Deformable DETR's classification cost).

    `least` is added to probabilities before the logarithm: 1e-8 in Deformable DETR's own code, 1e-12 in mmdetection's.
    """
    index = labels[None, :, None, :].expand(logits.shape[0], -1, logits.shape[2], -1)
    of_labels = logits.gather(3, index)  # only the classes that occur: K is far greater than T
    probability = of_labels.sigmoid()
    positive = alpha * (1 - probability) ** gamma * -(probability + least).log()
    negative = (1 - alpha) * probability**gamma * -(1 - probability + least).log()
    return positive - negative


def l1_cost(boxes: Float[Tensor, "L B N D"], targets: Float[Tensor, "B T D"]) -> Float[Tensor, "L B N T"]:
    """Return the sum of absolute differences of the four numbers of two boxes, or of those of two codes."""
    return torch.cdist(boxes, targets[None].expand(len(boxes), -1, -1, -1), p=1)


def giou_cost(boxes: Float[Tensor, "L B N 4"], targets: Float[Tensor, "B T 4"]) -> Float[Tensor, "L B N T"]:
    """Return minus the generalised IoU of two boxes in the form cx cy w h."""
    a, b = box_ops.to_corners(boxes)[:, :, :, None], box_ops.to_corners(targets)[None, :, None]
    return -box_ops.generalized_iou(a, b)


def soft_iou_cost(masks: Float[Tensor, "n *s"], targets: Float[Tensor, "T *s"]) -> Float[Tensor, "n T"]:
    """Return 1 - IoU of soft masks, whose overlap is the sum of products (ISDA's mask cost)."""
    p, t = masks.flatten(1), targets.flatten(1)
    overlap = p @ t.T
    return 1 - overlap / (p.sum(1)[:, None] + t.sum(1) - overlap + 1e-6)


def squared_dice_cost(
    masks: Float[Tensor, "L B N S S"], targets: Float[Tensor, "B T S S"], least: float
) -> Float[Tensor, "L B N T"]:
    """Return `losses.squared_dice_loss` of every mask with every target of its image."""
    p, t = masks.flatten(3), targets.flatten(2)
    squares = p.square().sum(-1)[..., None] + t.square().sum(-1)[None, :, None]
    return 1 - 2 * (p @ t.transpose(1, 2)) / (squares + least)


def cosine_cost(codes: Float[Tensor, "L B N D"], targets: Float[Tensor, "B T D"]) -> Float[Tensor, "L B N T"]:
    """Return minus the cosine of two codes, from -1 (the same direction) to 0 (opposite) (ISTR, eq. 7)."""
    a, b = F.normalize(codes, dim=-1), F.normalize(targets, dim=-1)
    return -(a @ b.transpose(1, 2) + 1) / 2


def class_targets(logits: Float[Tensor, "L B N K"], labels: Int[Tensor, "B T"], pairs: Matches) -> Float[Tensor, "L B N K"]:
    """Return 1 for each matched slot in the channel of its object's class, else 0."""
    targets = torch.zeros_like(logits)
    targets[pairs.layer, pairs.image, pairs.slot, labels[pairs.image, pairs.object]] = 1
    return targets


@torch.no_grad()
def match(cost: Float[Tensor, "L B N T"], counts: Sequence[int], predictions: Mapping[str, Tensor] | None = None) -> Matches:
    """Return, for every layer and image, the one-to-one assignment of slots and objects of least total cost.

    An image with more objects than slots leaves the objects with the highest cost unmatched. Pairs are ordered by slot.

    Args:
        cost: cost of each pair of slot and object; objects beyond an image's count are padding and ignored.
        counts: number of objects of each image.
        predictions: the tensors [L B N _] that the cost was computed from, by name, to report which of them is not finite.

    Raises:
        MatchingError: a cost is NaN or infinite; the message names tensor, layer, image and slots.
    """
    from scipy.optimize import linear_sum_assignment

    host = cost.detach().cpu().numpy()  # the only copy to the host, for all layers
    rows: list[tuple[int, int, int, int]] = []
    for layer in range(host.shape[0]):
        for image, count in enumerate(counts):
            matrix = host[layer, image, :, :count]
            if not np.isfinite(matrix).all():  # scipy itself lets plus infinity pass
                raise _not_finite(cost[layer, image, :, :count], layer, image, predictions or {})
            slots, objects = linear_sum_assignment(matrix)
            rows += [(layer, image, slot, object) for slot, object in zip(slots.tolist(), objects.tolist(), strict=True)]
    table = torch.tensor(rows, dtype=torch.int64).view(-1, 4).to(cost.device)
    layers, images, slots, objects = table.unbind(1)
    return Matches(layers, images, slots, objects, [min(count, host.shape[2]) for count in counts])


def _not_finite(
    cost: Float[Tensor, "N T"], layer: int, image: int, predictions: Mapping[str, Float[Tensor, "L B N _"]]
) -> MatchingError:
    slots = (~torch.isfinite(cost)).any(1).nonzero()[:, 0].tolist()
    not_finite = [name for name, tensor in predictions.items() if not torch.isfinite(tensor[layer, image]).all()]
    return MatchingError(
        f"the matching cost of layer {layer}, image {image} of the batch is NaN or infinite for slots {slots[:5]}"
        f"{' and others' if len(slots) > 5 else ''}, because {' and '.join(not_finite) or 'the sum of its parts'} is. "
        "Training has diverged."
    )
