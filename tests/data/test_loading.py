"""Batches depend on seed, epoch and image alone; the processes share one order; broken images are errors or replaced."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_files import annotation, coco, image, write

from maskset.data import CocoDataset, ImageRecord, ShapesDataset, open_data
from maskset.data.loading import batch_order, steps_per_epoch, training_batches, warn_about_slots
from maskset.errors import DataError
from maskset.instances import Instances
from maskset.recipe import DataConfig
from maskset.structures import ImageBatch

PLAIN = DataConfig(augmentation="flip", short_sides=(24, 32), workers=0)
Batches = list[tuple[ImageBatch, list[Instances]]]


class Watched(ShapesDataset):
    """Shapes that know which images were read; some of them cannot be."""

    def __init__(self, count: int, broken: tuple[int, ...] = (), skip_broken: bool = False) -> None:
        super().__init__("train", count, size=(24, 24))
        self.skip_broken, self.broken, self.read_indices = skip_broken, broken, list[int]()

    def read(self, index):
        self.read_indices.append(index)
        if index in self.broken:
            raise DataError(f"image {index} is broken.")
        return super().read(index)


def batches(dataset, config=PLAIN, batch_size=2, seed=1, epoch=0, **options) -> Batches:
    return list(training_batches(dataset, config, batch_size, 8, seed, epoch, **options))


def same(a: Batches, b: Batches) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.pixels, y.pixels)
        and torch.equal(x.sizes, y.sizes)
        and all(torch.equal(left.boxes, right.boxes) and left.masks == right.masks for left, right in zip(p, q, strict=True))
        for (x, p), (y, q) in zip(a, b, strict=True)
    )


def test_a_batch_holds_uint8_pixels_on_a_padded_canvas_and_the_objects() -> None:
    for images, objects in batches(ShapesDataset("train", 6, size=(24, 30))):
        assert images.pixels.dtype == torch.uint8
        assert images.pixels.shape[2] % 8 == images.pixels.shape[3] % 8 == 0
        assert [targets.masks.size for targets in objects] == [tuple(size) for size in images.sizes.tolist()]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(tmp_path: Path, workers: int) -> None:
    rows = [annotation(1), annotation(2, segmentation={"size": [30, 40], "counts": [100, 50, 1050]}), annotation(3, image=2)]
    data = open_data(write(tmp_path, coco(rows, [image(i) for i in range(1, 8)])), "train")
    alone = batches(data)
    assert same(alone, batches(data, replace(PLAIN, workers=workers)))
    assert same(alone[1:], batches(data, replace(PLAIN, workers=workers), start=1))


def test_seed_and_epoch_change_order_and_augmentation() -> None:
    data = ShapesDataset("train", 6, size=(24, 24))
    assert same(batches(data), batches(data))
    assert not same(batches(data), batches(data, epoch=1))
    assert not same(batches(data), batches(data, seed=2))


def test_starting_late_skips_batches_without_reading_them() -> None:
    data = Watched(10)
    whole = batches(data)
    data.read_indices.clear()
    assert same(batches(data, start=3), whole[3:])
    assert len(data.read_indices) == 4
    assert batches(data, start=5) == []
    assert batches(data, replace(PLAIN, workers=1), start=5) == []


def test_two_processes_share_the_batches_of_one() -> None:
    data = ShapesDataset("train", 13, size=(24, 24))
    whole = batches(data, batch_size=4)
    ranks = [batches(data, batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    assert len(whole) == len(ranks[0]) == len(ranks[1]) == steps_per_epoch(13, 2, 2) == 3
    for (_, all_objects), (_, first), (_, second) in zip(whole, *ranks, strict=True):
        assert all(left.masks == right.masks for left, right in zip(all_objects, [*first, *second], strict=True))


@pytest.mark.parametrize(("count", "batch_size", "expected"), [(12, 4, 3), (15, 4, 3), (3, 4, 1), (4, 4, 1)])
def test_only_an_only_batch_may_be_incomplete(count: int, batch_size: int, expected: int) -> None:
    order = batch_order(count, batch_size, seed=0, epoch=0, wide=np.arange(count) % 3 == 0)
    assert len(order) == expected == steps_per_epoch(count, batch_size)
    assert all(len(indices) == batch_size for indices in order)
    times = Counter(np.concatenate(order).tolist())
    assert max(times.values()) == -(-batch_size // count)
    assert set(times) <= set(range(count))


def test_every_epoch_shows_every_image_once() -> None:
    for epoch in range(3):
        assert sorted(np.concatenate(batch_order(24, 4, 0, epoch)).tolist()) == list(range(24))


def test_batches_hold_wide_or_tall_images_but_for_the_last_ones() -> None:
    data = ShapesDataset("train", 40, size=(24, 24))
    data.images = [ImageRecord(i, None, *((20, 30) if i % 3 else (30, 20))) for i in range(40)]
    wide = np.array([record.width >= record.height for record in data.images])
    order = batch_order(40, 4, 0, 0, wide)
    mixed = [len(set(wide[indices].tolist())) > 1 for indices in order]
    assert sum(mixed) <= 1
    assert any(mixed[:-1]) is False
    assert sum(len(set(wide[indices].tolist())) > 1 for indices in batch_order(40, 4, 0, 0)) > 3


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_an_error_that_names_it(workers: int) -> None:
    with pytest.raises(DataError) as raised:
        batches(Watched(8, broken=(5,)), replace(PLAIN, workers=workers))
    assert str(raised.value) == "image 5 is broken."


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_replaced_by_the_next_and_counted(workers: int) -> None:
    whole, data = Watched(8), Watched(8, broken=(5, 6), skip_broken=True)
    got = batches(data, replace(PLAIN, workers=workers))
    assert sorted(data.skipped) == ["image 5 is broken.", "image 6 is broken."]
    order = np.concatenate(batch_order(8, 2, 1, 0, np.ones(8, bool))).tolist()
    labels = [targets.labels.tolist() for _, objects in got for targets in objects]
    assert labels == [whole.targets(7 if i in (5, 6) else i).labels.tolist() for i in order]
    batches(data, epoch=1)
    assert len(data.skipped) == 2


def test_images_that_are_all_broken_are_an_error() -> None:
    with pytest.raises(DataError, match=r"none of the 3 images can be read. The first: image"):
        batches(Watched(3, broken=(0, 1, 2), skip_broken=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_torchs_own_random_numbers_are_left_alone(workers: int) -> None:
    before = torch.random.get_rng_state()
    batches(ShapesDataset("train", 4, size=(24, 24)), replace(PLAIN, workers=workers))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_crowded_image_travels_from_a_worker(tmp_path: Path) -> None:
    """One file handle for each of so many tensors would exceed what a process may open."""
    rows = [annotation(i, segmentation={"size": [30, 40], "counts": [i, 50, 1150 - i]}) for i in range(1100)]
    data = open_data(write(tmp_path, coco(rows, [image(1), image(2)])), "train")
    (_, objects), _ = batches(data, replace(PLAIN, workers=1, group_by_aspect=False), batch_size=1, seed=3)
    counts = [
        len(targets) for _, batch_targets in batches(data, replace(PLAIN, workers=1), batch_size=1) for targets in batch_targets
    ]
    assert sorted(counts) == [0, 1100]
    assert len(objects) == 1


def test_too_few_slots_are_warned_of(tmp_path: Path) -> None:
    rows = [annotation(i, image=1 + i // 5) for i in range(8)]
    data = open_data(write(tmp_path, coco(rows, [image(1), image(2), image(3)])), "train")
    assert isinstance(data, CocoDataset)
    assert warn_about_slots(data, 5) is None
    warning = warn_about_slots(data, 2)
    assert warning is not None
    assert warning.startswith("2 of 3 images have more objects (up to 5) than the model has slots (2)")
