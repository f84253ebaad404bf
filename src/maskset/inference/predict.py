"""Prediction of the `Instances` in images, in the order of the images."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from io import IOBase
from itertools import islice
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar, overload
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import UInt8
from PIL.Image import Image
from torch import Tensor, nn

from maskset import checkpoint, pictures
from maskset.data.transforms import fit
from maskset.errors import ConfigError, DataError, SourceError
from maskset.instances import Instances
from maskset.pictures import Picture
from maskset.progress import report, track
from maskset.structures import ImageBatch, ModelOutput
from maskset.systems.base import System
from maskset.tensors import Device, check_device

Item = TypeVar("Item")
Size = tuple[int, int]  # height, width

_READERS = 4  # threads that read and resize images for a GPU; with a model on the CPU, one is enough
_WINDOW = 32  # images in memory; those with equal padded size share a batch
_LARGEST_BATCH = 16  # images
_BATCH_PIXELS = {"cpu": 2**18, "cuda": 2**22}  # pixels of a batch: four images of 800 x 1333 on a GPU, one on the CPU


@overload
def predict(
    model: System | str | Path,
    source: str | Path,
    *,
    threshold: float = ...,
    limit: int | None = ...,
    device: Device | None = ...,
    skip_broken: bool = ...,
) -> Any: ...  # Instances for a file, an iterator for a folder or pattern: only the disk can tell
@overload
def predict(
    model: System | str | Path,
    source: bytes | IOBase | Image | np.ndarray | Tensor,
    *,
    threshold: float = ...,
    limit: int | None = ...,
    device: Device | None = ...,
    skip_broken: bool = ...,
) -> Instances: ...
@overload
def predict(
    model: System | str | Path,
    source: Sequence[Picture],
    *,
    threshold: float = ...,
    limit: int | None = ...,
    device: Device | None = ...,
    skip_broken: bool = ...,
) -> Iterator[Instances]: ...
def predict(
    model: System | str | Path,
    source: Picture | Sequence[Picture],
    *,
    threshold: float = 0.5,
    limit: int | None = None,
    device: Device | None = None,
    skip_broken: bool = False,
) -> Instances | Iterator[Instances]:
    """Return the objects in an image, best first; for several images an iterator over the objects of each, in order.

    The result for an image does not depend on the others, except for rounding: images share a batch only if their padding is the
    same as alone.

    Args:
        model: a system, or what `maskset.load` takes.
        source: an image: a file name, bytes, a file opened in binary mode, a Pillow image, a uint8 array [h w 3] or [h w], or a
            uint8 tensor [3 h w]; RGB. Or several: a list of these, a folder, or a pattern such as "photos/*.jpg". Not an
            iterator, since all are checked before the first is predicted.
        threshold: minimum score of an object.
        limit: maximum number of objects in an image; by default as many as the model can detect, its `num_slots`.
        device: device to compute on, to which a system is moved. By default a system stays on its device, and a model that is
            loaded is moved to a GPU if there is one.
        skip_broken: leave out files that cannot be read, and list them on stderr at the end. The iterator is then shorter than
            the list; `predict_files` returns the file of each result.

    Raises:
        maskset.errors.SourceError: a file does not exist, a folder contains no image, or the source is not an image.
        maskset.errors.DataError: a file cannot be read as an image; with `skip_broken`, none of the files can.
        maskset.errors.ConfigError: `model`, `threshold`, `limit` or `device` is not allowed.
    """
    _check(model, source, threshold, limit)
    images, single = pictures.expand(source), pictures.is_single(source)
    unreadable: list[str] = []
    read = partial(_read_or_skip, unreadable) if skip_broken and not single else pictures.read
    model = load_model(model, device)
    results = predict_items(model, images, read, limit=limit or model.num_slots, threshold=threshold)
    detections = (instances for _, instances in results)
    return next(detections) if single else _report_unreadable(detections, unreadable, len(images))


def predict_files(
    model: System | str | Path,
    sources: str | Path | Sequence[str | Path],
    *,
    threshold: float = 0.5,
    limit: int | None = None,
    device: Device | None = None,
    skip_broken: bool = False,
    progress: bool = True,
) -> Iterator[tuple[Path, Instances]]:
    """Return an iterator over image files and the objects in each.

    Args:
        model: see `predict`.
        sources: files, folders and patterns.
        threshold: see `predict`.
        limit: see `predict`.
        device: see `predict`.
        skip_broken: leave out files that cannot be read, and list them on stderr at the end.
        progress: whether to show progress on stderr.

    Raises:
        maskset.errors.MasksetError: as `predict` does.
    """
    _check(model, sources, threshold, limit)
    files, unreadable = pictures.expand_files(sources), list[str]()
    read = partial(_read_or_skip, unreadable) if skip_broken else _read_or_advise
    model = load_model(model, device)
    results = predict_items(model, files, read, limit=limit or model.num_slots, threshold=threshold)
    return _report_unreadable(track(results, len(files), "predicting") if progress else results, unreadable, len(files))


def check_model(model: Any) -> None:
    """Check that a model is a system, or a path that can be one of a checkpoint; nothing is read.

    Raises:
        ConfigError: it is not.
    """
    if isinstance(model, (str, Path)):
        if Path(model).suffix.lower() in pictures.ENDINGS:
            raise ConfigError(f"{model} is an image: the model comes first, then the images.")
        if "://" in str(model):
            raise ConfigError(f"{model} is an address: download the model, and give the file.")
        if not str(model):
            raise ConfigError("the name of the model is empty: give a run folder or a checkpoint file.")
    elif not isinstance(model, System):
        got = f"{type(model).__module__}.{type(model).__name__}"
        raise ConfigError(f"a model is a system of maskset (maskset.load returns one), a run folder or a checkpoint, got {got}.")


def load_model(model: System | str | Path, device: Device | None = None) -> System:
    """Return a system on the device; a run folder or checkpoint is loaded. See `predict`."""
    check_model(model)
    if device is not None:
        device = check_device(device)
    if isinstance(model, System):
        return model if device is None else model.to(device)
    return checkpoint.load(model).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


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
    """Yield each item with the predicted objects of its image, in order, on the CPU.

    Args:
        model: in training or evaluation mode; the mode does not change.
        items: arguments of `read`, which threads call in advance.
        read: returns RGB pixels, or None to leave out the item.
        limit: maximum number of objects in an image.
        threshold: minimum score of an object.
        batch_size: maximum number of images in a batch; by default it depends on their size.
        ignored_classes: class channels that are left out; they do not count toward `limit`.
    """

    def read_and_resize(item: Item) -> tuple[Item, Size, Tensor] | None:
        pixels = read(item)
        if pixels is None:
            return None
        return item, (pixels.shape[1], pixels.shape[2]), fit(pixels, model.input.short_side, model.input.long_side)

    pending: dict[int, tuple[Item, Size, Tensor]] = {}  # images that are read, but not predicted
    done: dict[int, tuple[Item, Instances]] = {}  # results that wait for an earlier one
    readers = 1 if _device(model).type == "cpu" else _READERS
    images = enumerate(image for image in _read_ahead(read_and_resize, items, readers) if image is not None)
    next_index = 0
    while True:
        pending.update(islice(images, _WINDOW - len(pending)))
        if not pending:
            return
        canvases = {index: _canvas(pixels, model.input.divisor) for index, (_, _, pixels) in pending.items()}
        canvas = canvases[next_index]  # the next result is never delayed by later images
        same = [index for index in canvases if canvases[index] == canvas]
        batch = same[: batch_size or _batch_size(canvas, model)]
        results = _predict_batch(model, [pending[index][1:] for index in batch], limit, threshold, ignored_classes)
        done |= {index: (pending.pop(index)[0], result) for index, result in zip(batch, results, strict=True)}
        while next_index in done:
            yield done.pop(next_index)
            next_index += 1


def _read_or_skip(unreadable: list[str], picture: Picture) -> UInt8[Tensor, "3 h w"] | None:
    """Return the pixels of an image, or None with a message in `unreadable` if it cannot be read."""
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


def _report_unreadable(results: Iterable[Item], unreadable: Sequence[str], total: int) -> Iterator[Item]:
    """Yield the results, then list on stderr the images that were left out of `total`.

    Raises:
        DataError: all images were left out.
    """
    yield from results
    if unreadable and len(unreadable) == total:
        raise DataError(f"none of {total} images can be read. The first: {unreadable[0]}")
    if unreadable:
        report(f"left out because they cannot be read: {len(unreadable)} of {total} images", *unreadable)


@torch.no_grad()
def _predict_batch(
    model: System, batch: Sequence[tuple[Size, Tensor]], limit: int, threshold: float, ignored_classes: Sequence[int]
) -> list[Instances]:
    """Return the objects of images, given as pairs of original size and resized pixels."""
    sizes, pixels = zip(*batch, strict=True)
    with _evaluation_mode(model):
        images = ImageBatch.from_images(pixels, model.input.divisor).to(_device(model)).normalized(model.input)
        images = replace(images, pixels=images.pixels.to(_dtype(model)))
        output = model(images)
        if ignored_classes:
            output = _suppress_classes(output, ignored_classes)
        return [detections.to("cpu") for detections in model.postprocess(output, images, sizes, limit, threshold)]


_predicting: WeakKeyDictionary[System, tuple[int, list[nn.Module]]] = WeakKeyDictionary()  # number of threads, modules to restore
_predicting_lock = threading.Lock()


@contextmanager
def _evaluation_mode(model: System) -> Iterator[None]:
    """Put a model into evaluation mode inside the context; the last of several threads restores training mode."""
    with _predicting_lock:
        threads, training = _predicting.get(model, (0, []))
        training = training or [module for module in model.modules() if module.training]  # without frozen parts, which never are
        _predicting[model] = threads + 1, training
        model.eval()
    try:
        yield
    finally:
        with _predicting_lock:
            threads, training = _predicting.pop(model)
            if threads > 1:
                _predicting[model] = threads - 1, training
            else:
                for module in training:
                    module.training = True


def _suppress_classes(output: ModelOutput, channels: Sequence[int]) -> ModelOutput:
    """Return the output with a score of zero for some classes."""
    index = torch.tensor(channels, device=output.layers[-1].class_logits.device)
    layers = [replace(layer, class_logits=layer.class_logits.index_fill(2, index, -torch.inf)) for layer in output.layers]
    return replace(output, layers=layers)


def _device(model: System) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _dtype(model: System) -> torch.dtype:
    return next((parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), torch.float32)


def _canvas(pixels: UInt8[Tensor, "3 h w"], divisor: int) -> Size:
    """Return the height and width to which an image alone is padded."""
    return -(-pixels.shape[1] // divisor) * divisor, -(-pixels.shape[2] // divisor) * divisor


def _batch_size(canvas: Size, model: System) -> int:
    images = _BATCH_PIXELS.get(_device(model).type, 2**22) // (canvas[0] * canvas[1])
    return min(max(images, 1), _LARGEST_BATCH)


def _read_ahead(read: Callable[[Item], Any], items: Iterable[Item], readers: int) -> Iterator[Any]:
    """Yield `read(item)` for each item, in order; threads read the next ones meanwhile."""
    with ThreadPoolExecutor(readers) as pool:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(read, item))
            if len(waiting) > 2 * readers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _check(model: Any, source: Any, threshold: Any, limit: Any) -> None:
    if isinstance(source, nn.Module):
        raise SourceError(f"the images are the second argument and the model the first, got a {type(source).__name__} second.")
    check_model(model)
    if isinstance(threshold, bool) or not isinstance(threshold, Real) or not 0 <= float(threshold) <= 1:
        raise ConfigError(f"threshold must be a number between 0 and 1, got {threshold!r}.")
    if limit is None:
        return
    if isinstance(limit, bool) or not isinstance(limit, Integral) or not 1 <= int(limit) < 2**31:
        raise ConfigError(f"limit must be a whole number, at least 1 and below 2^31, got {limit!r}.")
