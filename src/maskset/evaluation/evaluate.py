"""Evaluation of a model on annotated images by COCO's average precision."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor, distributed

from maskset.data import open_data
from maskset.data.dataset import Dataset
from maskset.data.transforms import fitted_size
from maskset.distributed import active, world_size
from maskset.errors import DataError, MasksetError
from maskset.evaluation.average_precision import compute_metrics, mask_ap
from maskset.evaluation.metrics import Metrics
from maskset.evaluation.overlaps import Overlaps, overlaps
from maskset.inference.predict import load_model, predict_items
from maskset.instances import Category, Instances
from maskset.messages import first_names
from maskset.progress import track
from maskset.systems.base import System
from maskset.tensors import Device

_FIRST_ESTIMATE = 16  # number of images after which progress shows the first estimate of mask AP


def evaluate(
    model: System | str | Path,
    data: str | Path | Dataset,
    *,
    split: str = "val",
    max_detections: int = 100,
    images: str | Path | None = None,
    skip_broken: bool = False,
    batch_size: int | None = None,
    device: Device | None = None,
    progress: bool = True,
) -> Metrics:
    """Return COCO's metrics of a model on a split of annotated images.

    Classes of model and data are matched by name. Classes that only the model has are ignored and do not count toward
    `max_detections`. Objects of classes that only the data has count as missed. Several processes (torch.distributed) share the
    images and return the same metrics.

    Args:
        model: a system, or anything that `maskset.load` takes. Its training mode is not changed.
        data: a data set, or anything that `maskset.data.open_data` takes.
        split: part of the data. It is ignored for a data set that is already open, as are `images` and `skip_broken`.
        max_detections: number of detections per image that count, best first. Choose at least the number of objects in an image.
        images: the image folder, where `data` is a JSON file.
        skip_broken: leave out broken annotations and images that cannot be read.
        batch_size: largest number of images in a batch; None chooses it by their size.
        device: see `maskset.predict`.
        progress: whether to show progress and the current mask AP (of the first process) on stderr.

    Raises:
        DataError: the data cannot be read, or has no class of the model.
        MasksetError: `max_detections` is less than 1.
    """
    if max_detections < 1:
        raise MasksetError(f"max_detections must be at least 1, got {max_detections}.")
    model = load_model(model, device)
    dataset = open_data(data, split, images, skip_broken) if isinstance(data, (str, Path)) else data
    if not isinstance(dataset, Dataset):
        raise DataError(f"data must be a data folder, a COCO JSON file, 'shapes:' or a Dataset, got {type(data).__name__}.")
    own_images = _own_images(dataset, model)
    unreadable: dict[int, str] = {}
    predictions = detections_in(model, dataset, own_images, max_detections, batch_size, unreadable)
    progress = progress and (not active() or distributed.get_rank() == 0)
    overlaps_of = _collect_overlaps(dataset, predictions, len(own_images), max_detections, progress)
    model_names, data_names = ({category.name: None for category in owner.categories} for owner in (model, dataset))
    return replace(
        _gather_metrics(dataset, overlaps_of, unreadable, max_detections),
        missing_in_model=tuple(name for name in data_names if name not in model_names),
        missing_in_data=tuple(name for name in model_names if name not in data_names),
    )


def detections_in(
    model: System,
    dataset: Dataset,
    images: Sequence[int],
    limit: int,
    batch_size: int | None = None,
    unreadable: dict[int, str] | None = None,
) -> Iterator[tuple[int, Instances]]:
    """Return an iterator over images and a model's detections in them, with the classes of the data, matched by name.

    Args:
        model: a system.
        dataset: the data set.
        images: positions of the images.
        limit: largest number of detections in an image, best first; all are of classes that the data has.
        batch_size: see `evaluate`.
        unreadable: a message on each image that cannot be read and is left out is added here.

    Raises:
        DataError: no class of the model is in the data, or an image cannot be read and the data set does not skip broken ones.
    """
    labels = class_labels(model.categories, dataset.categories)
    hidden = [channel for channel, label in enumerate(labels) if label < 0]
    read = partial(_read, dataset, {} if unreadable is None else unreadable)
    predictions = predict_items(model, images, read, limit=limit, batch_size=batch_size, ignored_classes=hidden)
    return ((index, _relabel(detections, labels, dataset.categories)) for index, detections in predictions)


def _read(dataset: Dataset, unreadable: dict[int, str], index: int) -> UInt8[Tensor, "3 h w"] | None:
    """Return the pixels of an image; None, with a message in `unreadable`, if it is broken and broken images are skipped."""
    try:
        return dataset.image(index)
    except DataError as error:
        if not dataset.skip_broken:
            raise
        unreadable[index] = str(error)
        if str(error) not in dataset.skipped:
            dataset.skipped.append(str(error))
        return None


def class_labels(model: Sequence[Category], data: Sequence[Category]) -> list[int]:
    """Return the label in the data of each class of a model, by name; -1 where the data does not have the class.

    Raises:
        DataError: model and data have no class in common.
    """
    if tuple(model) == tuple(data):
        return list(range(len(data)))
    label_of = {category.name: label for label, category in enumerate(data)}
    labels = [label_of.get(category.name, -1) for category in model]
    if max(labels, default=-1) < 0:
        detected, annotated = (first_names([category.name for category in categories], 5) for categories in (model, data))
        raise DataError(f"the model detects {detected}, the data has {annotated}: no class has the same name in both.")
    return labels


def _own_images(dataset: Dataset, model: System) -> list[int]:
    """Return the images that this process evaluates, sorted by size, so that batches are full."""
    short, long = model.input.short_side, model.input.long_side
    sizes = [fitted_size((image.height, image.width), short, long) for image in dataset.images]
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    return order[distributed.get_rank() :: world_size()] if active() else order


def _collect_overlaps(
    dataset: Dataset, predictions: Iterable[tuple[int, Instances]], total: int, max_detections: int, progress: bool
) -> dict[int, Overlaps]:
    """Return the overlaps of detections and targets in each image; masks are dropped.

    Progress includes the mask AP of the images so far, computed whenever their number has doubled: in total that takes less time
    than the metrics at the end.
    """
    overlaps_of: dict[int, Overlaps] = {}
    note, due = "", _FIRST_ESTIMATE
    if progress:
        predictions = track(predictions, total, "evaluating", note=lambda: note)
    for index, detections in predictions:
        overlaps_of[index] = overlaps(dataset, index, detections)
        if progress and len(overlaps_of) == due < total:
            ap = mask_ap(list(overlaps_of.values()), dataset.categories, max_detections)
            note, due = "" if isnan(ap) else f", mask AP ~{ap:.3f} over {due} images", 2 * due
    return overlaps_of


def _relabel(detections: Instances, labels: Sequence[int], categories: tuple[Category, ...]) -> Instances:
    """Return detections with the data's labels, without those whose class the data does not have."""
    new_labels = torch.tensor(labels)[detections.labels]
    return replace(detections, labels=new_labels, categories=categories)[new_labels >= 0]


def _gather_metrics(
    dataset: Dataset, overlaps_of: dict[int, Overlaps], unreadable: dict[int, str], max_detections: int
) -> Metrics:
    """Return the metrics over the images of all processes."""
    if not active():
        return _metrics(dataset, overlaps_of, unreadable, max_detections)
    first = distributed.get_rank() == 0
    parts: list[Any] = [None] * world_size()
    distributed.gather_object((overlaps_of, unreadable), parts if first else None)
    result: list[Any] = [None]
    if first:
        overlaps_of = {index: overlap for part, _ in parts for index, overlap in part.items()}
        unreadable = {index: problem for _, part in parts for index, problem in part.items()}
        result = [_metrics(dataset, overlaps_of, unreadable, max_detections)]
    distributed.broadcast_object_list(result)
    return result[0]


def _metrics(dataset: Dataset, overlaps_of: dict[int, Overlaps], unreadable: dict[int, str], max_detections: int) -> Metrics:
    images = sorted(overlaps_of)  # the order decides between equal scores
    metrics = compute_metrics([overlaps_of[index] for index in images], dataset.categories, max_detections)
    unread = [unreadable[index] for index in sorted(unreadable)]
    opened = [problem for problem in dataset.skipped if problem not in unreadable.values()]
    counts = np.array([int((~overlaps_of[index].crowd).sum()) for index in images], dtype=np.int64)
    return replace(
        metrics,
        skipped=len(opened) + len(unread),
        unreadable=len(unread),
        first_skipped=next(iter(opened + unread), ""),
        images_over_limit=int((counts > max_detections).sum()),
        most_objects=int(counts.max(initial=0)),
    )
