"""COCO's average precision of masks and boxes. What is found in an image is compared as it comes; no mask is kept.

faster-coco-eval does the matching; the tests hold its numbers to those of pycocotools, the official and slower program.
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
    """Return COCO's metrics for the results in the images of a data set.

    Args:
        data: what is annotated.
        results: positions in the data with what was found there; the classes found are the data's.
        max_detections: how many results of a class count in an image, best first.
        images: positions of those to measure on; None means all. Where `results` has none of them, nothing was found.

    Raises:
        ValueError: `max_detections` is less than 1, or what was found has no scores.
    """
    if max_detections < 1:
        raise MasksetError(f"max_detections must be at least 1, got {max_detections}.")
    compared = {index: overlaps(data, index, found) for index, found in results}
    wanted = range(len(data)) if images is None else sorted(images)  # in order: it decides between equal scores
    for index in set(wanted) - set(compared):
        compared[index] = overlaps(data, index, replace(data.objects(index)[:0], scores=torch.zeros(0)))
    return measured([compared[index] for index in wanted], data.categories, max_detections)


def measured(images: Sequence[Overlaps], categories: Sequence[Category], max_detections: int) -> Metrics:
    """Return COCO's metrics for images whose objects and results were compared."""
    masks, boxes = (_match(images, kind, len(categories), max_detections) for kind in (MASK, BOX))
    counts = np.zeros(len(categories), np.int64)
    for one in images:
        counts += np.bincount(one.object_labels[~one.crowd], minlength=len(categories))
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
    """Return `measured(...).mask_ap` alone, which takes less than half of the time."""
    precision, _ = _match(images, MASK, len(categories), max_detections)
    return _mean(precision[..., 0, -1])


def _match(images: Sequence[Overlaps], kind: int, classes: int, max_detections: int) -> tuple[np.ndarray, np.ndarray]:
    """Return precision [IoU, recall, class, size, count] and recall [IoU, class, size, count]; -1 where nothing is annotated.

    IoU: 0.50, 0.55, ..., 0.95. Recall: 0, 0.01, ..., 1. Class: as in the data. Size: all, small, medium, large. Count: the best
    1, the best 10, all that count.
    """
    # The public COCOeval_faster takes a dict for each object, with its mask. What it calls takes overlaps that are known.
    import faster_coco_eval.faster_eval_api_cpp as matching
    from faster_coco_eval.core.cocoeval import Params

    rules = Params("bbox")  # those of masks are the same
    rules.maxDets = [min(1, max_detections), min(10, max_detections), max_detections]
    precision, recall = np.full((10, 101, classes, 4, 3), -1.0), np.full((10, classes, 4, 3), -1.0)
    if not images:
        return precision, recall
    found = _by_class([(one.labels, one.scores, one.areas[kind]) for one in images], classes)
    annotated = _by_class([(one.object_labels, one.object_areas, one.crowd) for one in images], classes)
    for k, (results, objects) in enumerate(zip(found, annotated, strict=True)):  # one at a time: the matches take much memory
        given, wanted = matching.Dataset(), matching.Dataset()
        for number, (image, score, area) in enumerate(results, 1):
            given.append(image, k, {"id": number, "score": score, "area": area})
        for number, (image, area, crowd) in enumerate(objects, 1):  # from 1 on: an object with id 0 would never count as found
            wanted.append(image, k, {"id": number, "area": area, "iscrowd": int(crowd), "ignore": int(crowd)})
        rules.imgIds, rules.catIds = sorted({image for image, *_ in results + objects}), [k]
        ious = [[images[i].ious[k][kind, :max_detections].tolist() if k in images[i].ious else []] for i in rules.imgIds]
        answer = matching.COCOevalEvaluateAccumulate(rules, ious, wanted, given, rules.imgIds, rules.catIds, True)
        precision[:, :, k], recall[:, k] = answer["precision"][:, :, 0], answer["recall"][:, 0]
    return precision, recall


def _by_class(images: Sequence[tuple[np.ndarray, ...]], classes: int) -> Iterator[list[tuple]]:
    """Yield for each class its things as (position of the image, *values), image by image.

    Args:
        images: for each the labels of its things, and arrays of their values.
        classes: how many there are.
    """
    image = np.repeat(np.arange(len(images)), [len(labels) for labels, *_ in images])
    label, *values = map(np.concatenate, zip(*images, strict=True))
    for k in range(classes):
        chosen = np.flatnonzero(label == k)
        yield list(zip(*(value[chosen].tolist() for value in (image, *values)), strict=True))


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
    """Return the mean over what was annotated, NaN if nothing was."""
    measured = values[values > -1]
    return float(measured.mean()) if measured.size else nan
