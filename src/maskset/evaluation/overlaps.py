"""Overlaps of the detections and targets of an image: all that average precision needs, without the masks."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64

from maskset import rle
from maskset.data.dataset import Dataset
from maskset.errors import MasksetError
from maskset.instances import Instances, Masks


@dataclass(frozen=True, eq=False)
class Overlaps:
    """The detections and targets of one image and their IoUs: a few kilobytes, whatever the size of the image.

    Arrays with an axis of length 2 hold values of masks first, then of boxes.

    Attributes:
        labels: classes of the detections, best detection first.
        scores: scores of the detections.
        areas: areas of the detections, pixels.
        target_labels: classes of the targets, crowds last.
        target_areas: annotated areas of the targets, pixels; 0 for crowds, in which detections are ignored at any size.
        crowd: whether a target is a crowd.
        ious: for each class with detections and targets, the IoU of each detection with each target of the class, in the order of
            `labels` and `target_labels`; with a crowd, the part of the detection that lies in it.
    """

    labels: Int64[np.ndarray, "T"]
    scores: Float64[np.ndarray, "T"]
    areas: Float64[np.ndarray, "2 T"]
    target_labels: Int64[np.ndarray, "G"]
    target_areas: Float64[np.ndarray, "G"]
    crowd: Bool[np.ndarray, "G"]
    ious: dict[int, Float64[np.ndarray, "2 detections targets"]]


def overlaps(data: Dataset, index: int, detections: Instances) -> Overlaps:
    """Return the overlaps of detections with the targets of an image, given by its position in the data.

    Raises:
        MasksetError: the detections have no scores.
    """
    from pycocotools import mask as coco_mask

    if detections.scores is None:
        raise MasksetError("detections need scores, got objects without: are they annotations?")
    iou: Any = coco_mask.iou  # its type stub does not know boxes
    scores = detections.scores.double().cpu().numpy()
    detections, targets, crowds = detections.to("cpu"), data.targets(index), data.crowds(index)
    target_masks = Masks.cat([targets.masks, crowds.masks])
    target_labels = np.concatenate([targets.labels.numpy(), crowds.labels.numpy()])
    target_boxes = np.concatenate([_boxes(targets), _boxes(crowds)])
    crowd = np.repeat([False, True], [len(targets), len(crowds)])
    order = np.argsort(-scores, kind="stable")
    labels, boxes = detections.labels.numpy()[order], _boxes(detections)[order]
    ious = {}
    for label in np.intersect1d(labels, target_labels).tolist():
        detection_index, target_index = np.flatnonzero(labels == label), np.flatnonzero(target_labels == label)
        masks = iou(_as_coco(detections.masks, order[detection_index]), _as_coco(target_masks, target_index), crowd[target_index])
        ious[label] = np.stack([masks, iou(boxes[detection_index], target_boxes[target_index], crowd[target_index])])
    return Overlaps(
        labels=labels,
        scores=scores[order],
        areas=np.stack([detections.masks.areas().double().numpy()[order], boxes[:, 2] * boxes[:, 3]]),
        target_labels=target_labels,
        target_areas=np.concatenate([data.areas(index).double().numpy(), np.zeros(len(crowds))]),
        crowd=crowd,
        ious=ious,
    )


def _boxes(objects: Instances) -> Float64[np.ndarray, "T 4"]:
    """Return boxes in COCO's format: left, top, width, height."""
    boxes = objects.boxes.double().numpy()
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)


def _as_coco(masks: Masks, indices: Int64[np.ndarray, "n"]) -> list[dict[str, Any]]:
    """Return some of the masks in the format of pycocotools."""
    texts = rle.to_strings(masks[torch.from_numpy(indices)].rle(), masks.size)
    return [{"size": masks.size, "counts": text} for text in texts]
