"""Set prediction (DETR, eq. 1 and 2): matching costs, the matching, the losses of class and box, and the best detections.

SOLQ and SOIT use `match_and_box_losses`, ISTR and ISTR-SMT `match_and_corner_losses`; mask losses are in the systems' own files.
Costs are computed for all layers and images at once: the objects of each image are padded to the largest number T in the batch,
so that a cost is one tensor [L, B, N, T]. It is copied to the host once, and scipy solves each image.
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
from maskset.losses import focal_loss, giou_loss, l1_loss, sum_by_layer
from maskset.structures import SlotPredictions


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
    eps: float = 1e-8,
) -> Float[Tensor, "L B N T"]:
    """Return the change of the focal loss if the slot predicted the object's class (Deformable DETR's classification cost).

    `eps` is added to probabilities before the logarithm: 1e-8 in Deformable DETR's own code, 1e-12 in mmdetection's.
    """
    index = labels[None, :, None, :].expand(logits.shape[0], -1, logits.shape[2], -1)
    of_labels = logits.gather(3, index)  # only the classes that occur: K is far greater than T
    probability = of_labels.sigmoid()
    positive = alpha * (1 - probability) ** gamma * -(probability + eps).log()
    negative = (1 - alpha) * probability**gamma * -(1 - probability + eps).log()
    return positive - negative


def l1_cost(boxes: Float[Tensor, "L B N D"], targets: Float[Tensor, "B T D"]) -> Float[Tensor, "L B N T"]:
    """Return the sum of absolute differences of the four numbers of two boxes, or of those of two codes."""
    return torch.cdist(boxes, targets[None].expand(len(boxes), -1, -1, -1), p=1)


def giou_cost(boxes: Float[Tensor, "L B N 4"], targets: Float[Tensor, "B T 4"]) -> Float[Tensor, "L B N T"]:
    """Return minus the generalized IoU of two boxes in the form cx cy w h."""
    a, b = box_ops.to_corners(boxes)[:, :, :, None], box_ops.to_corners(targets)[None, :, None]
    return -box_ops.generalized_iou(a, b)


def soft_iou_cost(masks: Float[Tensor, "n *s"], targets: Float[Tensor, "T *s"]) -> Float[Tensor, "n T"]:
    """Return 1 - IoU of soft masks, whose overlap is the sum of products (ISDA's mask cost)."""
    p, t = masks.flatten(1), targets.flatten(1)
    overlap = p @ t.T
    return 1 - overlap / (p.sum(1)[:, None] + t.sum(1) - overlap + 1e-6)


def squared_dice_cost(
    masks: Float[Tensor, "L B N S S"], targets: Float[Tensor, "B T S S"], eps: float
) -> Float[Tensor, "L B N T"]:
    """Return `losses.squared_dice_loss` of every mask with every target of its image."""
    p, t = masks.flatten(3), targets.flatten(2)
    squares = p.square().sum(-1)[..., None] + t.square().sum(-1)[None, :, None]
    return 1 - 2 * (p @ t.transpose(1, 2)) / (squares + eps)


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


def match_and_box_losses(
    layers: Sequence[SlotPredictions],
    labels: Sequence[Int[Tensor, "_"]],
    boxes: Sequence[Float[Tensor, "_ 4"]],
    weights: tuple[float, float, float],
    eps: float = 1e-8,
) -> tuple[Matches, dict[str, Float[Tensor, "L"]]]:
    """Return the matches of all layers and the weighted sums class, box_l1 and box_giou of each layer, not yet normalized.

    Args:
        layers: each with class logits and boxes.
        labels: class of each object, for each image.
        boxes: of each object, cx cy w h in fractions of the unpadded image, for each image.
        weights: of class, L1 and generalized IoU, in the matching cost and in the losses.
        eps: see `focal_cost`.

    Raises:
        MatchingError: a prediction is NaN or infinite.
    """
    for_class, for_l1, for_giou = weights
    logits = torch.stack([layer.class_logits for layer in layers]).float()  # [L B N K]
    predicted = torch.stack([layer.boxes for layer in layers if layer.boxes is not None])  # [L B N 4]
    padded_labels, padded_boxes = pad(labels).to(logits.device), pad(boxes).to(logits.device)
    with torch.no_grad():
        cost = for_class * focal_cost(logits, padded_labels, eps=eps)
        cost = cost + for_l1 * l1_cost(predicted, padded_boxes)
        cost = cost + for_giou * giou_cost(predicted, padded_boxes)
    pairs = match(cost, [len(label) for label in labels], {"class_logits": logits, "boxes": predicted})
    matched, expected = predicted[pairs.layer, pairs.image, pairs.slot], padded_boxes[pairs.image, pairs.object]
    return pairs, {
        "class": for_class * focal_loss(logits, class_targets(logits, padded_labels, pairs)).sum((1, 2, 3)),
        "box_l1": for_l1 * sum_by_layer(l1_loss(matched, expected), pairs.layer, len(layers)),
        "box_giou": for_giou * sum_by_layer(giou_loss(matched, expected), pairs.layer, len(layers)),
    }


def match_and_corner_losses(
    layers: Sequence[SlotPredictions],
    labels: Sequence[Int[Tensor, "_"]],
    boxes: Sequence[Float[Tensor, "_ 4"]],
    weights: tuple[float, float, float],
    mask_cost: Float[Tensor, "L B N T"],
) -> tuple[Matches, dict[str, Float[Tensor, "L"]]]:
    """Return the same as `match_and_box_losses`, with a mask cost and the L1 distance of corners (Sparse R-CNN).

    Args:
        layers: each with class logits, boxes and mask parameters.
        labels: class of each object, for each image.
        boxes: of each object, cx cy w h in fractions of the unpadded image, for each image.
        weights: of class, L1 and generalized IoU, in the matching cost and in the losses.
        mask_cost: weighted matching cost of each slot's mask for each object.

    Raises:
        MatchingError: a prediction is NaN or infinite.
    """
    for_class, for_l1, for_giou = weights
    logits = torch.stack([layer.class_logits for layer in layers]).float()  # [L B N K]
    predicted = torch.stack([layer.boxes for layer in layers if layer.boxes is not None])  # [L B N 4]
    codes = torch.stack([layer.mask_params for layer in layers if layer.mask_params is not None])  # [L B N D]
    padded_labels, padded_boxes = pad(labels).to(logits.device), pad(boxes).to(logits.device)
    corners, padded_corners = box_ops.to_corners(predicted), box_ops.to_corners(padded_boxes)
    with torch.no_grad():
        cost = for_class * focal_cost(logits, padded_labels) + mask_cost
        cost = cost + for_l1 * l1_cost(corners, padded_corners)
        cost = cost + for_giou * giou_cost(predicted, padded_boxes)
    predictions = {"class_logits": logits, "boxes": predicted, "mask_params": codes}
    pairs = match(cost, [len(label) for label in labels], predictions)
    slots, objects = (pairs.layer, pairs.image, pairs.slot), (pairs.image, pairs.object)
    l1 = l1_loss(corners[slots], padded_corners[objects])
    giou = giou_loss(predicted[slots], padded_boxes[objects])
    return pairs, {
        "class": for_class * focal_loss(logits, class_targets(logits, padded_labels, pairs)).sum((1, 2, 3)),
        "box_l1": for_l1 * sum_by_layer(l1, pairs.layer, len(layers)),
        "box_giou": for_giou * sum_by_layer(giou, pairs.layer, len(layers)),
    }


def top_k_detections(
    logits: Float[Tensor, "N K"], limit: int, threshold: float
) -> tuple[Int[Tensor, "n"], Int[Tensor, "n"], Float[Tensor, "n"]]:
    """Return slot, class and score of the `limit` best pairs of slot and class, best first; a slot may have several classes."""
    scores, index = logits.float().sigmoid().flatten().topk(min(limit, logits.numel()))
    index, scores = index[scores >= threshold], scores[scores >= threshold]
    return index // logits.shape[1], index % logits.shape[1], scores


def top_k_detections_in_image(
    logits: Float[Tensor, "N K"], boxes: Float[Tensor, "N 4"], size: tuple[int, int], limit: int, threshold: float
) -> tuple[Int[Tensor, "n"], Int[Tensor, "n"], Float[Tensor, "n"], Float[Tensor, "N 4"]]:
    """Return `top_k_detections` without those whose box is outside the image, and the boxes of all slots clipped to the image.

    Args:
        logits: of the slots of one image.
        boxes: cx cy w h in fractions of the image.
        size: height and width of the image, pixels.
        limit: number of pairs to select before boxes outside are dropped.
        threshold: least score.
    """
    corners = box_ops.clip(box_ops.to_corners(boxes) * box_ops.scale_of(size, boxes), size)
    slots, labels, scores = top_k_detections(logits, limit, threshold)
    visible = box_ops.area(corners)[slots] > 0
    return slots[visible], labels[visible], scores[visible], corners
