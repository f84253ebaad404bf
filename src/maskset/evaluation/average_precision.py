"""COCO's average precision of masks and boxes, measured on run lengths: memory grows with the objects, not with the images.

faster-coco-eval does the matching; the tests hold its numbers to those of pycocotools, the official and slower program.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from math import nan
from typing import Any, Literal

import numpy as np

from maskset.data.dataset import Dataset
from maskset.evaluation.metrics import ClassMetrics, Metrics

Row = dict[str, Any]  # a COCO annotation or result as `Instances.to_coco` writes it; its image_id is the position in the data


def average_precision(
    data: Dataset, results: Iterable[Row], max_detections: int = 100, images: Sequence[int] | None = None
) -> Metrics:
    """Return COCO's metrics for the results in the images of a data set.

    Args:
        data: what is annotated.
        results: `found.to_coco(position)` of every image in one list; the classes found are the data's.
        max_detections: how many results of a class count in an image, best first.
        images: positions of those to measure on; None means all.

    Raises:
        ValueError: `max_detections` is less than 1.
    """
    if max_detections < 1:
        raise ValueError(f"max_detections must be at least 1, got {max_detections}.")
    measured = range(len(data)) if images is None else images
    annotations = [row for index in measured for row in _annotations(data, index)]
    results = list(results)
    masks = _match(data, annotations, results, "segm", max_detections)
    boxes = _match(data, annotations, results, "bbox", max_detections)

    objects = Counter(row["category_id"] for row in annotations if not row["iscrowd"])
    per_class = tuple(
        ClassMetrics(
            name=category.name,
            objects=objects[category.coco_id],
            mask_ap=_mean(masks[0][:, :, k, 0, -1]),
            mask_ap50=_mean(masks[0][0, :, k, 0, -1]),
            box_ap=_mean(boxes[0][:, :, k, 0, -1]),
            box_ap50=_mean(boxes[0][0, :, k, 0, -1]),
        )
        for k, category in enumerate(data.categories)
    )
    return Metrics(
        **_summary("mask", *masks),
        **_summary("box", *boxes),
        max_detections=max_detections,
        images=len(measured),
        objects=objects.total(),
        per_class=per_class,
    )


def _annotations(data: Dataset, index: int) -> list[Row]:
    """Return what is annotated in an image, crowds too, as COCO annotations, with the areas that the annotators gave."""
    objects = data.objects(index).to_coco(index)
    crowds = data.crowds(index).to_coco(index)
    areas = data.areas(index).tolist()
    return [{**row, "area": area} for row, area in zip(objects, areas, strict=True)] + [{**row, "iscrowd": 1} for row in crowds]


def _match(
    data: Dataset, annotations: Sequence[Row], results: Sequence[Row], kind: Literal["segm", "bbox"], max_detections: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return precision [IoU, recall, class, size, count] and recall [IoU, class, size, count]; -1 where nothing is annotated.

    IoU: 0.50, 0.55, ..., 0.95. Recall: 0, 0.01, ..., 1. Class: as in the data. Size: all, small, medium, large. Count: the best
    1, the best 10, all that count.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    def made(rows: Sequence[Row]) -> COCO:
        images = [{"id": index, "height": 0, "width": 0} for index in range(len(data))]
        categories = [{"id": category.coco_id, "name": category.name} for category in data.categories]
        return COCO({"images": images, "categories": categories, "annotations": rows})

    # Annotation ids start at 1: an object with id 0 would never count as found. A found box is small or large by its own area.
    numbered = [{**row, "id": number} for number, row in enumerate(annotations, 1)]
    found = [{**row, "id": number} for number, row in enumerate(results, 1)]
    if kind == "bbox":
        for row in found:
            row["area"] = row["bbox"][2] * row["bbox"][3]
    matching = COCOeval_faster(made(numbered), made(found), kind)
    matching.params.maxDets = [min(1, max_detections), min(10, max_detections), max_detections]
    matching.evaluate()
    matching.accumulate()
    order = np.searchsorted(matching.params.catIds, [category.coco_id for category in data.categories])
    return matching.eval["precision"][:, :, order], matching.eval["recall"][:, order]


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
