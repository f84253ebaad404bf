"""Training batches of annotated images: order, augmentation, and reading in worker processes."""

import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils import _pytree as pytree  # not public: see tests/evaluation/test_private_apis.py
from torch.utils.data import DataLoader, get_worker_info

from maskset.data.dataset import Dataset
from maskset.data.settings import DataConfig
from maskset.data.transforms import augment
from maskset.errors import DataError, ResourceError
from maskset.instances import Instances
from maskset.structures import ImageBatch

READER_KILLED = (
    "a process that reads images was killed, maybe for lack of memory. Use fewer of them (data.workers, or 0 to read in the "
    "training process). A run can be resumed from its last checkpoint."
)
_SHARED_MEMORY = Path("/dev/shm")  # on Linux
_TOO_LITTLE_SHARED_MEMORY = (
    f"shared memory ({_SHARED_MEMORY}) is too small for {{}} ({{}}). Give a container more with docker run --shm-size=8g, "
    "or read the images in the training process with data.workers 0."
)


def training_batches(
    dataset: Dataset,
    config: DataConfig,
    batch_size: int,
    divisor: int,
    seed: int,
    epoch: int,
    rank: int = 0,
    world_size: int = 1,
    start: int = 0,
) -> Iterator[tuple[ImageBatch, list[Instances]]]:
    """Yield the batches of one epoch for this process: uint8 pixels on a padded canvas, and the targets of each image.

    Order and augmentation depend only on seed, epoch and image, not on the number of workers. Batch k of all processes together
    is batch k of one process with `world_size * batch_size`. With `dataset.skip_broken`, an image that cannot be read is
    replaced by the next one that can, and is listed in `dataset.skipped`.

    Args:
        dataset: the data set to read.
        config: augmentation, grouping and workers.
        batch_size: images per batch and process.
        divisor: the canvas is padded to a multiple of this, pixels.
        seed: seed of order and augmentation, from 0.
        epoch: epoch, from 0.
        rank: index of this process.
        world_size: number of processes.
        start: number of batches to skip at the beginning, without reading them.

    Raises:
        DataError: an image is broken.
        ResourceError: shared memory is too small for a batch.
    """
    wide = np.array([record.width >= record.height for record in dataset.images]) if config.group_by_aspect else None
    order = batch_order(len(dataset), batch_size * world_size, seed, epoch, wide)
    mine = [indices.reshape(world_size, -1)[rank].tolist() for indices in order[start:]]
    reader = _Reader(dataset, config, divisor, seed, epoch)
    for batch in _in_workers(reader, mine, config.workers) if config.workers and mine else map(reader, mine):
        if isinstance(batch, Exception):
            raise batch
        dataset.skipped += [problem for problem in batch.problems if problem not in dataset.skipped]
        targets = pytree.tree_map_only(_Array, lambda array: torch.from_numpy(array.values), batch.targets)
        yield batch.images, targets


def steps_per_epoch(count: int, batch_size: int, world_size: int = 1) -> int:
    """Return the number of batches per process; an incomplete batch is dropped, unless it is the only one."""
    return max(1, count // (batch_size * world_size))


def batch_order(
    count: int, batch_size: int, seed: int, epoch: int, wide: np.ndarray | None = None
) -> list[Int64[np.ndarray, "_"]]:
    """Return the images of each batch of an epoch, over all processes.

    Args:
        count: number of images.
        batch_size: images per batch, over all processes. If all images do not fill one batch, they are repeated.
        seed: seed of the order.
        epoch: epoch, from 0.
        wide: whether each image is at least as wide as tall; if given, wide and tall images are in separate batches, except for
            the last ones.
    """
    shuffled = np.random.default_rng([seed, epoch]).permutation(count)
    if count < batch_size:
        return [np.resize(shuffled, batch_size)]
    batches, waiting = [], ([], [])
    for index in shuffled.tolist():
        group = waiting[int(wide is not None and wide[index])]
        group.append(index)
        if len(group) == batch_size:
            batches.append(np.array(group))
            group.clear()
    rest = waiting[0] + waiting[1]
    whole = len(rest) // batch_size
    return batches + [np.array(rest[i * batch_size : (i + 1) * batch_size]) for i in range(whole)]


def warn_about_slots(dataset: Dataset, slots: int) -> str | None:
    """Return a warning if images have more objects than a model has slots; else None."""
    counts = dataset.counts()
    over = int((counts > slots).sum())
    if not over:
        return None
    return (
        f"{over} of {len(counts)} images have more objects (up to {counts.max()}) than the model has slots ({slots}), "
        f"so some objects can be neither learned nor detected: use {counts.max()} slots or more, or cut the images into tiles."
    )


@dataclass(frozen=True)
class _Array:
    """A tensor that a worker sends by value, because each shared tensor would need a file handle."""

    values: np.ndarray


@dataclass(frozen=True)
class _Batch:
    images: ImageBatch
    targets: list[Instances]  # with `_Array` in place of tensors
    problems: list[str]

    def pin_memory(self) -> "_Batch":
        return _Batch(self.images.pin_memory(), self.targets, self.problems)


@dataclass(frozen=True)
class _Reader:
    """Reads the images of a batch, in the main process or in a worker."""

    dataset: Dataset
    config: DataConfig
    divisor: int
    seed: int
    epoch: int

    def __call__(self, indices: list[int]) -> _Batch | DataError | ResourceError:
        problems: list[str] = []
        try:
            samples = [self._sample(index, problems) for index in indices]
        except DataError as error:
            return error  # if a worker raised it, its message would include a traceback
        targets = pytree.tree_map_only(Tensor, lambda tensor: _Array(tensor.numpy()), [targets for _, targets in samples])
        images = ImageBatch.from_images([pixels for pixels, _ in samples], self.divisor)
        if get_worker_info() is not None:
            try:  # here, because torch does it in a thread that loses the batch on an error, and training would wait forever
                for tensor in (images.pixels, images.sizes):
                    tensor.share_memory_()
            except RuntimeError as error:
                return ResourceError(_TOO_LITTLE_SHARED_MEMORY.format(f"a batch of {images.pixels.nbytes / 1e6:.1f} MB", error))
        return _Batch(images, targets, problems)

    __getitem__ = __call__  # DataLoader indexes a data set with the image indices of a batch

    def _sample(self, index: int, problems: list[str]) -> tuple[Tensor, Instances]:
        pixels, targets = self._read_or_next(index, problems)
        rng = np.random.default_rng([self.seed, self.epoch, index + 1])  # a 0 at the end would repeat the numbers of the order
        return augment(pixels, targets, self.config, rng)

    def _read_or_next(self, index: int, problems: list[str]) -> tuple[Tensor, Instances]:
        count = len(self.dataset)
        for step in range(count):
            try:
                return self.dataset.read((index + step) % count)
            except DataError as error:
                if not self.dataset.skip_broken:
                    raise
                problems.append(str(error))
        raise DataError(f"none of the {count} images can be read. The first: {problems[0]}")


def _handle_sigterm(_: int) -> None:
    """Handle SIGTERM in a worker as in the main process, see `Interruption`: torch replaces the inherited handler."""
    handler = signal.getsignal(signal.SIGTERM)
    if callable(handler):
        signal.signal(signal.SIGTERM, handler)


def _in_workers(reader: _Reader, batches: list[list[int]], workers: int) -> Iterator[_Batch | DataError | ResourceError]:
    if _SHARED_MEMORY.is_dir() and (free := shutil.disk_usage(_SHARED_MEMORY).free) < 2**20:  # else torch fails with a traceback
        raise ResourceError(_TOO_LITTLE_SHARED_MEMORY.format("the processes that read images", f"{free} bytes are free"))
    loader = DataLoader(
        reader,  # type: ignore[arg-type]
        batch_size=None,
        sampler=batches,  # type: ignore[arg-type]
        num_workers=min(workers, len(batches)),
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else torch's own is used, and a resumed run would depend on workers
        multiprocessing_context="fork" if sys.platform == "linux" else None,  # others copy the data set into each worker
        worker_init_fn=_handle_sigterm,
    )
    try:
        yield from loader
    except (EOFError, ConnectionError) as error:
        with suppress(RuntimeError):  # torch raises another error when SIGCHLD arrives, which may be a little later
            time.sleep(1)
        raise ResourceError(READER_KILLED) from error
