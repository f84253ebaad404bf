"""Evaluation: a model on annotated images, measured by COCO's average precision."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from math import isnan
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor, distributed

from maskset.data import open_data
from maskset.data.dataset import Dataset
from maskset.data.transforms import fitted_size
from maskset.distributed import active, world_size
from maskset.errors import DataError, MasksetError
from maskset.evaluation.average_precision import mask_ap, measured
from maskset.evaluation.metrics import Metrics
from maskset.evaluation.overlaps import Overlaps, overlaps
from maskset.inference.predict import load_model, predict_items
from maskset.instances import Category, Instances
from maskset.progress import track
from maskset.systems.base import System
from maskset.tensors import Device

_FIRST_ESTIMATE = 16  # images; fewer say too little


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

    The classes of model and data are matched by name. Classes that only the model has are not looked at, so that they take no
    place among the best `max_detections`: the result is that of a model without them. Classes that only the data has count as
    never found. Several processes (torch.distributed) share the images and return the same.

    Args:
        model: a system, or what `maskset.load` takes. Its mode (training or not) stays as it is.
        data: what `maskset.data.open_data` takes, or what it returned.
        split: which part of the data; of no meaning where `data` is open already, like `images` and `skip_broken`.
        max_detections: how many objects of an image count, best first. It should not be less than images have objects.
        images: the folder of the images, where `data` is a JSON file.
        skip_broken: leave out what `open_data` finds broken, and images that cannot be read.
        batch_size: most images computed at once; None chooses by their size.
        device: see `maskset.predict`.
        progress: whether to show on stderr how far it is, and the mask AP so far (of several processes, that of the first).

    Raises:
        maskset.errors.DataError: the data cannot be read, or no class of the model is in it.
        ValueError: `max_detections` is less than 1.
    """
    if max_detections < 1:
        raise MasksetError(f"max_detections must be at least 1, got {max_detections}.")
    model = load_model(model, device)
    dataset = open_data(data, split, images, skip_broken) if isinstance(data, (str, Path)) else data
    share = _share(dataset, model)
    unreadable: dict[int, str] = {}
    answers = found_in(model, dataset, share, max_detections, batch_size, unreadable)
    progress = progress and (not active() or distributed.get_rank() == 0)
    compared = _compared(dataset, answers, len(share), max_detections, progress)
    of_model, of_data = ({category.name: None for category in one.categories} for one in (model, dataset))
    return replace(
        _gathered(dataset, compared, unreadable, max_detections),
        missing_in_model=tuple(name for name in of_data if name not in of_model),
        missing_in_data=tuple(name for name in of_model if name not in of_data),
    )


def found_in(
    model: System,
    dataset: Dataset,
    images: Sequence[int],
    limit: int,
    batch_size: int | None = None,
    unreadable: dict[int, str] | None = None,
) -> Iterator[tuple[int, Instances]]:
    """Return an iterator over images and what the model finds in each, with the classes of the data, matched by name.

    Args:
        model: a system.
        dataset: whose images they are.
        images: their positions.
        limit: how many objects of an image are wanted, best first; none is of a class that the data does not have.
        batch_size: see `evaluate`.
        unreadable: gets a message for each image that is left out because it cannot be read.

    Raises:
        maskset.errors.DataError: no class of the model is in the data, or an image cannot be read and none is skipped.
    """
    labels = class_labels(model.categories, dataset.categories)
    hidden = [channel for channel, label in enumerate(labels) if label < 0]
    read = partial(_read, dataset, {} if unreadable is None else unreadable)
    answers = predict_items(model, images, read, limit=limit, batch_size=batch_size, ignored_classes=hidden)
    return ((index, _renamed(one, labels, dataset.categories)) for index, one in answers)


def _read(dataset: Dataset, unreadable: dict[int, str], index: int) -> UInt8[Tensor, "3 h w"] | None:
    """Return the pixels of an image; None, and a message in `unreadable`, if it is broken and broken ones shall be skipped."""
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
    """Return which class of the data each of the model's is, -1 for none.

    Raises:
        maskset.errors.DataError: none of them is one of the data's.
    """
    if tuple(model) == tuple(data):
        return list(range(len(data)))
    places = {category.name: label for label, category in enumerate(data)}
    labels = [places.get(category.name, -1) for category in model]
    if max(labels, default=-1) < 0:
        raise DataError(f"the model finds {_some(model)}, the data has {_some(data)}: no class has the same name in both.")
    return labels


def _some(categories: Sequence[Category]) -> str:
    return ", ".join(category.name for category in categories[:5]) + (", ..." if len(categories) > 5 else "")


def _share(dataset: Dataset, model: System) -> list[int]:
    """Return the images that this process evaluates, those of one size together, so that batches are full."""
    wanted = model.input
    sizes = [fitted_size((image.height, image.width), wanted.short_side, wanted.long_side) for image in dataset.images]
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    return order[distributed.get_rank() :: world_size()] if active() else order


def _compared(
    dataset: Dataset, answers: Iterable[tuple[int, Instances]], total: int, max_detections: int, progress: bool
) -> dict[int, Overlaps]:
    """Return what was found in each image compared with what is annotated; the masks are not kept.

    Where progress is shown, it has the mask AP of the images so far, computed each time that they are twice as many: altogether
    that takes less than what is computed at the end.
    """
    compared: dict[int, Overlaps] = {}
    note, due = "", _FIRST_ESTIMATE
    if progress:
        answers = track(answers, total, "evaluating", note=lambda: note)
    for index, found in answers:
        compared[index] = overlaps(dataset, index, found)
        if progress and len(compared) == due < total:
            ap = mask_ap(list(compared.values()), dataset.categories, max_detections)
            note, due = "" if isnan(ap) else f", mask AP ~{ap:.3f} over {due} images", 2 * due
    return compared


def _renamed(found: Instances, labels: Sequence[int], categories: tuple[Category, ...]) -> Instances:
    """Return what was found with the data's classes, without what the data has no class for."""
    renamed = torch.tensor(labels)[found.labels]
    return replace(found, labels=renamed, categories=categories)[renamed >= 0]


def _gathered(dataset: Dataset, compared: dict[int, Overlaps], unreadable: dict[int, str], max_detections: int) -> Metrics:
    """Return the metrics of what this process, or all of them together, found in each image or could not read."""
    if not active():
        return _metrics(dataset, compared, unreadable, max_detections)
    first = distributed.get_rank() == 0
    parts: list[Any] = [None] * world_size()
    distributed.gather_object((compared, unreadable), parts if first else None)
    answer: list[Any] = [None]
    if first:
        compared = {index: one for part, _ in parts for index, one in part.items()}
        unreadable = {index: problem for _, part in parts for index, problem in part.items()}
        answer = [_metrics(dataset, compared, unreadable, max_detections)]
    distributed.broadcast_object_list(answer)
    return answer[0]


def _metrics(dataset: Dataset, compared: dict[int, Overlaps], unreadable: dict[int, str], max_detections: int) -> Metrics:
    images = sorted(compared)  # the order decides between equal scores
    metrics = measured([compared[index] for index in images], dataset.categories, max_detections)
    unread = [unreadable[index] for index in sorted(unreadable)]
    opened = [problem for problem in dataset.skipped if problem not in unreadable.values()]
    counts = dataset.counts()[images]
    return replace(
        metrics,
        skipped=len(opened) + len(unread),
        unreadable=len(unread),
        first_skipped=next(iter(opened + unread), ""),
        images_over_limit=int((counts > max_detections).sum()),
        most_objects=int(counts.max(initial=0)),
    )
