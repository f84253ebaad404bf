"""Classes and boxes: DETR's matching and losses (eq. 1 and 2) with Deformable DETR's focal loss, and the top detections.

SOLQ and SOIT use `match_and_box_losses`, ISTR and ISTR-SMT `match_and_corner_losses`; mask losses are in their own files.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from maskset import boxes as box_ops
from maskset.losses import focal_loss, giou_loss, l1_loss, sum_by_layer
from maskset.matching import Matches, class_targets, focal_cost, giou_cost, l1_cost, match, pad
from maskset.structures import SlotPredictions


def match_and_box_losses(
    layers: Sequence[SlotPredictions],
    labels: Sequence[Int[Tensor, "_"]],
    boxes: Sequence[Float[Tensor, "_ 4"]],
    weights: tuple[float, float, float],
    least: float = 1e-8,
) -> tuple[Matches, dict[str, Float[Tensor, "L"]]]:
    """Return the matches of all layers and the weighted sums class, box_l1 and box_giou of each layer, not yet normalised.

    Args:
        layers: each with class logits and boxes.
        labels: class of each object, for each image.
        boxes: of each object, cx cy w h in fractions of the unpadded image, for each image.
        weights: of class, L1 and generalised IoU, in the matching cost and in the losses.
        least: see `focal_cost`.

    Raises:
        MatchingError: a prediction is NaN or infinite.
    """
    for_class, for_l1, for_giou = weights
    logits = torch.stack([layer.class_logits for layer in layers]).float()  # [L B N K]
    predicted = torch.stack([layer.boxes for layer in layers if layer.boxes is not None])  # [L B N 4]
    padded_labels, padded_boxes = pad(labels).to(logits.device), pad(boxes).to(logits.device)
    with torch.no_grad():
        cost = for_class * focal_cost(logits, padded_labels, least=least)
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
        weights: of class, L1 and generalised IoU, in the matching cost and in the losses.
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
