"""What is found in an image compared with what is annotated there: all that average precision needs of it, without the masks."""

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
    """What is found and what is annotated in one image: some kilobytes, whatever the size of the image.

    Where there are two of a thing, the first is of masks, the second of boxes.

    Attributes:
        labels: class of each found object, best first.
        scores: of each found object.
        areas: of each found object, pixels.
        object_labels: class of each annotated object, crowds last.
        object_areas: of each annotated object as the annotators gave it, pixels; 0 for crowds, which are forgiven at any size.
        crowd: whether it is a crowd.
        ious: for each class that is found and annotated, the IoU of each found with each annotated object of the class, in the
            order of `labels` and `object_labels`; with a crowd, the part of the found object that lies in it.
    """

    labels: Int64[np.ndarray, "T"]
    scores: Float64[np.ndarray, "T"]
    areas: Float64[np.ndarray, "2 T"]
    object_labels: Int64[np.ndarray, "G"]
    object_areas: Float64[np.ndarray, "G"]
    crowd: Bool[np.ndarray, "G"]
    ious: dict[int, Float64[np.ndarray, "2 found annotated"]]


def overlaps(data: Dataset, index: int, found: Instances) -> Overlaps:
    """Return what was found in an image, given by its position in the data, compared with what is annotated there.

    Raises:
        ValueError: what was found has no scores.
    """
    from pycocotools import mask as coco_mask

    if found.scores is None:
        raise MasksetError("results need scores, got objects without: are they annotations?")
    iou: Any = coco_mask.iou  # its type stub does not know boxes
    scores = found.scores.double().cpu().numpy()
    found, objects, crowds = found.to("cpu"), data.objects(index), data.crowds(index)
    annotated = Masks.cat([objects.masks, crowds.masks])
    object_labels = np.concatenate([objects.labels.numpy(), crowds.labels.numpy()])
    object_boxes = np.concatenate([_boxes(objects), _boxes(crowds)])
    crowd = np.repeat([False, True], [len(objects), len(crowds)])
    order = np.argsort(-scores, kind="stable")
    labels, boxes = found.labels.numpy()[order], _boxes(found)[order]
    ious = {}
    for label in np.intersect1d(labels, object_labels).tolist():
        of, on = np.flatnonzero(labels == label), np.flatnonzero(object_labels == label)
        masks = iou(_written(found.masks, order[of]), _written(annotated, on), crowd[on])
        ious[label] = np.stack([masks, iou(boxes[of], object_boxes[on], crowd[on])])
    return Overlaps(
        labels=labels,
        scores=scores[order],
        areas=np.stack([found.masks.areas().double().numpy()[order], boxes[:, 2] * boxes[:, 3]]),
        object_labels=object_labels,
        object_areas=np.concatenate([data.areas(index).double().numpy(), np.zeros(len(crowds))]),
        crowd=crowd,
        ious=ious,
    )


def _boxes(objects: Instances) -> Float64[np.ndarray, "T 4"]:
    """Return boxes as COCO has them: left, top, width, height."""
    boxes = objects.boxes.double().numpy()
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)


def _written(masks: Masks, chosen: Int64[np.ndarray, "chosen"]) -> list[dict[str, Any]]:
    """Return some of the masks as pycocotools wants them."""
    texts = rle.to_strings(masks[torch.from_numpy(chosen)].rle(), masks.size)
    return [{"size": masks.size, "counts": text} for text in texts]
