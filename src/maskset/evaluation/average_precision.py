"""COCO's average precision of masks and boxes, computed from the overlaps of each image, without keeping masks.

faster-coco-eval matches detections and targets; tests compare its numbers with those of the official pycocotools.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from math import nan
from typing import Any

import numpy as np
import torch

from maskset.data.dataset import Dataset
from maskset.errors import MasksetError
from maskset.evaluation.metrics import ClassMetrics, Metrics
from maskset.evaluation.overlaps import Overlaps, overlaps
from maskset.instances import Category, Instances

MASK, BOX = 0, 1  # of the two in `Overlaps`


def average_precision(
    data: Dataset, results: Iterable[tuple[int, Instances]], max_detections: int = 100, images: Sequence[int] | None = None
) -> Metrics:
    """Return COCO's metrics for detections in the images of a data set.

    Args:
        data: the data set.
        results: positions of images with the detections in them; their classes are the data's.
        max_detections: number of detections of a class that count in an image, best first.
        images: positions of the images to evaluate; None means all. Those that `results` lacks have no detections.

    Raises:
        MasksetError: `max_detections` is less than 1, or detections have no scores.
    """
    if max_detections < 1:
        raise MasksetError(f"max_detections must be at least 1, got {max_detections}.")
    overlaps_of = {index: overlaps(data, index, detections) for index, detections in results}
    positions = range(len(data)) if images is None else sorted(images)  # the order decides between equal scores
    for index in set(positions) - set(overlaps_of):
        overlaps_of[index] = overlaps(data, index, replace(data.targets(index)[:0], scores=torch.zeros(0)))
    return compute_metrics([overlaps_of[index] for index in positions], data.categories, max_detections)


def compute_metrics(images: Sequence[Overlaps], categories: Sequence[Category], max_detections: int) -> Metrics:
    """Return COCO's metrics for the overlaps of a number of images."""
    masks, boxes = (_match(images, kind, len(categories), max_detections) for kind in (MASK, BOX))
    counts = np.zeros(len(categories), np.int64)
    for image in images:
        counts += np.bincount(image.target_labels[~image.crowd], minlength=len(categories))
    per_class = tuple(
        ClassMetrics(
            name=category.name,
            objects=int(counts[k]),
            mask_ap=_mean(masks[0][:, :, k, 0, -1]),
            mask_ap50=_mean(masks[0][0, :, k, 0, -1]),
            box_ap=_mean(boxes[0][:, :, k, 0, -1]),
            box_ap50=_mean(boxes[0][0, :, k, 0, -1]),
        )
        for k, category in enumerate(categories)
    )
    return Metrics(
        **_summary("mask", *masks),
        **_summary("box", *boxes),
        max_detections=max_detections,
        images=len(images),
        objects=int(counts.sum()),
        per_class=per_class,
    )


def mask_ap(images: Sequence[Overlaps], categories: Sequence[Category], max_detections: int) -> float:
    """Return only `compute_metrics(...).mask_ap`, in less than half of the time."""
    precision, _ = _match(images, MASK, len(categories), max_detections)
    return _mean(precision[..., 0, -1])


def _match(images: Sequence[Overlaps], kind: int, classes: int, max_detections: int) -> tuple[np.ndarray, np.ndarray]:
    """Return precision [IoU, recall, class, size, count] and recall [IoU, class, size, count]; -1 without targets.

    IoU: 0.50, 0.55, ..., 0.95. Recall: 0, 0.01, ..., 1. Class: as in the data. Size: all, small, medium, large. Count: the best
    1, the best 10, the best `max_detections`.
    """
    # The public COCOeval_faster takes a dict with the mask of each object. The module that it calls takes IoUs but is private:
    # pyproject.toml bounds the version, and tests/evaluation/test_private_apis.py names what is used of it.
    import faster_coco_eval.faster_eval_api_cpp as matching
    from faster_coco_eval.core.cocoeval import Params

    rules = Params("bbox")  # those of masks are the same
    rules.maxDets = [min(1, max_detections), min(10, max_detections), max_detections]
    precision, recall = np.full((10, 101, classes, 4, 3), -1.0), np.full((10, classes, 4, 3), -1.0)
    if not images:
        return precision, recall
    detections = _by_class([(image.labels, image.scores, image.areas[kind]) for image in images], classes)
    targets = _by_class([(image.target_labels, image.target_areas, image.crowd) for image in images], classes)
    for k, (results, objects) in enumerate(zip(detections, targets, strict=True)):  # class by class: matches take much memory
        coco_detections, coco_targets = matching.Dataset(), matching.Dataset()
        for number, (image, score, area) in enumerate(results, 1):
            coco_detections.append(image, k, {"id": number, "score": score, "area": area})
        for number, (image, area, crowd) in enumerate(objects, 1):  # from 1 on: a target with id 0 would never count as detected
            coco_targets.append(image, k, {"id": number, "area": area, "iscrowd": int(crowd), "ignore": int(crowd)})
        rules.imgIds, rules.catIds = sorted({image for image, *_ in results + objects}), [k]
        ious = [[images[i].ious[k][kind, :max_detections].tolist() if k in images[i].ious else []] for i in rules.imgIds]
        curves = matching.COCOevalEvaluateAccumulate(rules, ious, coco_targets, coco_detections, rules.imgIds, rules.catIds, True)
        precision[:, :, k], recall[:, k] = curves["precision"][:, :, 0], curves["recall"][:, 0]
    return precision, recall


def _by_class(images: Sequence[tuple[np.ndarray, ...]], classes: int) -> Iterator[list[tuple]]:
    """Yield the objects of each class as (position of the image, *values), image by image.

    Args:
        images: for each image, the labels of its objects and arrays of their values.
        classes: number of classes.
    """
    image = np.repeat(np.arange(len(images)), [len(labels) for labels, *_ in images])
    label, *values = map(np.concatenate, zip(*images, strict=True))
    for k in range(classes):
        members = np.flatnonzero(label == k)
        yield list(zip(*(value[members].tolist() for value in (image, *values)), strict=True))


def _summary(kind: str, precision: np.ndarray, recall: np.ndarray) -> dict[str, Any]:
    """Return the numbers of COCO's table, named as in `Metrics`."""
    numbers = {
        "ap": precision[..., 0, -1],
        "ap50": precision[0, ..., 0, -1],
        "ap75": precision[5, ..., 0, -1],
        "ap_small": precision[..., 1, -1],
        "ap_medium": precision[..., 2, -1],
        "ap_large": precision[..., 3, -1],
        "ar_1": recall[..., 0, 0],
        "ar_10": recall[..., 0, 1],
        "ar": recall[..., 0, -1],
        "ar_small": recall[..., 1, -1],
        "ar_medium": recall[..., 2, -1],
        "ar_large": recall[..., 3, -1],
    }
    return {f"{kind}_{name}": _mean(values) for name, values in numbers.items()}


def _mean(values: np.ndarray) -> float:
    """Return the mean over values that are not -1, NaN if there is none."""
    valid = values[values > -1]
    return float(valid.mean()) if valid.size else nan
