"""Prediction: pictures in, objects out, in the order of the pictures."""

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import torch
from jaxtyping import UInt8
from PIL.Image import Image
from torch import Tensor

from maskset import pictures
from maskset.data.transforms import fit
from maskset.errors import DataError, MasksetError
from maskset.instances import Instances
from maskset.pictures import Picture
from maskset.progress import track
from maskset.structures import ImageBatch, ModelOutput
from maskset.systems.base import System
from maskset.tensors import Device

Item = TypeVar("Item")
Size = tuple[int, int]  # height, width

_READERS = 4  # threads that read and resize pictures while a GPU computes; where the CPU computes, one is enough
_WINDOW = 32  # pictures that are kept, to find those of one canvas among them
_LARGEST_BATCH = 16  # pictures
_BATCH_PIXELS = {"cpu": 2**18, "cuda": 2**22}  # a batch's canvases together: four of 800 x 1333 on a GPU, one on the CPU


@overload
def predict(
    model: System | str | Path,
    source: str | Path,
    *,
    threshold: float = ...,
    limit: int = ...,
    device: Device | None = ...,
    skip_broken: bool = ...,
) -> Any: ...  # Instances for a file, an iterator for a folder or pattern: only the disk can tell
@overload
def predict(
    model: System | str | Path,
    source: Image | np.ndarray | Tensor,
    *,
    threshold: float = ...,
    limit: int = ...,
    device: Device | None = ...,
    skip_broken: bool = ...,
) -> Instances: ...
@overload
def predict(
    model: System | str | Path,
    source: Sequence[Picture],
    *,
    threshold: float = ...,
    limit: int = ...,
    device: Device | None = ...,
    skip_broken: bool = ...,
) -> Iterator[Instances]: ...
def predict(
    model: System | str | Path,
    source: Picture | Sequence[Picture],
    *,
    threshold: float = 0.5,
    limit: int = 100,
    device: Device | None = None,
    skip_broken: bool = False,
) -> Instances | Iterator[Instances]:
    """Return the objects in a picture, best first; for several pictures an iterator over those of each, in order.

    What is found in a picture does not depend on the others (but for rounding): pictures share a batch only if each has the
    padding that it would have alone.

    Args:
        model: a system, or what `maskset.load` takes.
        source: one picture: a file, a Pillow image, a uint8 array [h w 3] or [h w], or a uint8 tensor [3 h w]; RGB. Several:
            a list of these, a folder, or a pattern such as "photos/*.jpg"; a list may hold folders and patterns.
        threshold: least score of an object.
        limit: how many objects a picture may have at the most.
        device: where to compute; None leaves a system where it is, and puts one that is loaded on a GPU if there is one.
        skip_broken: of several pictures, leave out those that cannot be read, and name them on stderr at the end; the iterator
            is then shorter than the list, and `predict_files` says whose results these are.

    Raises:
        maskset.pictures.SourceError: there is no such file, or no image in the folder, or it is no picture.
        maskset.errors.DataError: a file cannot be read as an image; with `skip_broken`, none of several can.
    """
    _check(threshold, limit)
    listed, several = pictures.listed(source), pictures.several(source)
    unreadable: list[str] = []
    read = partial(_read_or_skip, unreadable) if skip_broken and several else pictures.read
    answers = predict_items(load_model(model, device), listed, read, limit=limit, threshold=threshold)
    found = (instances for _, instances in answers)
    return _and_tell(found, unreadable, len(listed)) if several else next(found)


def predict_files(
    model: System | str | Path,
    sources: Sequence[str | Path],
    *,
    threshold: float = 0.5,
    limit: int = 100,
    device: Device | None = None,
    skip_broken: bool = False,
) -> Iterator[tuple[Path, Instances]]:
    """Return an iterator over the files that are meant and the objects in each; it shows its progress on stderr.

    Args:
        model: see `predict`.
        sources: files, folders and patterns.
        threshold: see `predict`.
        limit: see `predict`.
        device: see `predict`.
        skip_broken: leave out files that cannot be read, and name them on stderr at the end.

    Raises:
        ValueError: as `predict` does.
    """
    _check(threshold, limit)
    files, unreadable = pictures.files(sources), list[str]()
    read = partial(_read_or_skip, unreadable) if skip_broken else _read_or_advise
    answers = predict_items(load_model(model, device), files, read, limit=limit, threshold=threshold)
    return _and_tell(track(answers, len(files), "predicting"), unreadable, len(files))


def load_model(model: System | str | Path, device: Device | None = None) -> System:
    """Return the model, loaded where it is given by name, on the device; see `predict`."""
    if isinstance(model, System):
        return model if device is None else model.to(device)
    from maskset.checkpoint import load

    return load(model).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def predict_items(
    model: System,
    items: Iterable[Item],
    read: Callable[[Item], UInt8[Tensor, "3 h w"] | None],
    *,
    limit: int,
    threshold: float = 0.0,
    batch_size: int | None = None,
    ignored_classes: Sequence[int] = (),
) -> Iterator[tuple[Item, Instances]]:
    """Yield each item with the objects that the model finds in its picture, in order, on the CPU.

    Args:
        model: it is left in the mode (training or not) in which it was.
        items: what `read` makes pictures of, in threads, a little ahead.
        read: returns RGB pixels, or None for an item that shall be left out.
        limit: how many objects a picture may have at the most.
        threshold: least score of an object.
        batch_size: most pictures of a batch; None chooses by their size.
        ignored_classes: class channels that are left out; they do not count towards `limit`.
    """

    def fitted(item: Item) -> tuple[Item, Size, Tensor] | None:
        pixels = read(item)
        if pixels is None:
            return None
        return item, (pixels.shape[1], pixels.shape[2]), fit(pixels, model.input.short_side, model.input.long_side)

    pending: dict[int, tuple[Item, Size, Tensor]] = {}  # read but not computed
    found: dict[int, tuple[Item, Instances]] = {}  # computed, but one before it is not
    readers = 1 if _device(model).type == "cpu" else _READERS
    pictures_read = enumerate(one for one in _ahead(fitted, items, readers) if one is not None)
    turn = 0
    while True:
        pending.update(islice(pictures_read, _WINDOW - len(pending)))
        if not pending:
            return
        canvases = {place: _canvas(pixels, model.input.divisor) for place, (_, _, pixels) in pending.items()}
        canvas = canvases[turn]  # the next in order is never kept waiting
        alike = [place for place in canvases if canvases[place] == canvas]
        batch = alike[: batch_size or _batch_size(canvas, model)]
        answers = _answer(model, [pending[place][1:] for place in batch], limit, threshold, ignored_classes)
        found |= {place: (pending.pop(place)[0], answer) for place, answer in zip(batch, answers, strict=True)}
        while turn in found:
            yield found.pop(turn)
            turn += 1


def _read_or_skip(unreadable: list[str], picture: Picture) -> UInt8[Tensor, "3 h w"] | None:
    """Return the pixels of a picture; None, and a message in `unreadable`, where it cannot be read."""
    try:
        return pictures.read(picture)
    except DataError as error:
        unreadable.append(str(error))
        return None


def _read_or_advise(file: Path) -> UInt8[Tensor, "3 h w"]:
    try:
        return pictures.read(file)
    except DataError as error:
        advice = "No results.json is written; --skip-broken (in Python: skip_broken=True) leaves out files that cannot be read."
        raise DataError(f"{str(error).removesuffix('.')}. {advice}") from error


def _and_tell(answers: Iterable[Item], unreadable: Sequence[str], total: int) -> Iterator[Item]:
    """Yield the answers, then name on stderr what was left out of `total` pictures.

    Raises:
        DataError: all were left out.
    """
    yield from answers
    if unreadable and len(unreadable) == total:
        raise DataError(f"none of {total} pictures can be read. The first: {unreadable[0]}")
    if unreadable:
        print(f"left out, because they cannot be read: {len(unreadable)} of {total} pictures", file=sys.stderr)
        print(*(f"  {problem}" for problem in unreadable), sep="\n", file=sys.stderr, flush=True)


@torch.no_grad()
def _answer(
    model: System, batch: Sequence[tuple[Size, Tensor]], limit: int, threshold: float, ignored_classes: Sequence[int]
) -> list[Instances]:
    """Return the objects in pictures, given with their own sizes and at the size that the model wants."""
    sizes, pixels = zip(*batch, strict=True)
    with _not_training(model):
        images = ImageBatch.from_images(pixels, model.input.divisor).to(_device(model)).normalised(model.input)
        output = model(images)
        if ignored_classes:
            output = _without(output, ignored_classes)
        return [found.to("cpu") for found in model.postprocess(output, images, sizes, limit, threshold)]


@contextmanager
def _not_training(model: System) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]  # frozen parts of a model in training are not
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _without(output: ModelOutput, channels: Sequence[int]) -> ModelOutput:
    """Return the output with a score of zero for some classes."""
    places = torch.tensor(channels, device=output.layers[-1].class_logits.device)
    layers = [replace(layer, class_logits=layer.class_logits.index_fill(2, places, -torch.inf)) for layer in output.layers]
    return replace(output, layers=layers)


def _device(model: System) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _canvas(pixels: UInt8[Tensor, "3 h w"], divisor: int) -> Size:
    """Return the height and width to which a picture is padded when it is alone."""
    return -(-pixels.shape[1] // divisor) * divisor, -(-pixels.shape[2] // divisor) * divisor


def _batch_size(canvas: Size, model: System) -> int:
    most = _BATCH_PIXELS.get(_device(model).type, 2**22) // (canvas[0] * canvas[1])
    return min(max(most, 1), _LARGEST_BATCH)


def _ahead(read: Callable[[Item], Any], items: Iterable[Item], readers: int) -> Iterator[Any]:
    """Yield what `read` returns of each item, in order; threads work on the next ones meanwhile."""
    with ThreadPoolExecutor(readers) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(read, item))
            if len(waiting) > 2 * readers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _check(threshold: float, limit: int) -> None:
    if not 0 <= threshold <= 1:
        raise MasksetError(f"threshold must be between 0 and 1, got {threshold}.")
    if limit < 1:
        raise MasksetError(f"limit must be at least 1, got {limit}.")
