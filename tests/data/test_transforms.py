"""Augmentation moves pixels, boxes and masks together, as the papers do."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from maskset.data.shapes import ShapesDataset
from maskset.data.transforms import augment, crop, fit, fitted_size, flip, resize
from maskset.instances import Instances, Masks
from maskset.recipe import DataConfig

DETR = DataConfig(short_sides=(96, 112), long_side=180, crop_short_sides=(72, 80), crop_range=(48, 64))


@pytest.fixture(scope="module")
def shapes() -> ShapesDataset:
    return ShapesDataset("val", size=(80, 100))


def square(size: tuple[int, int], box: tuple[int, int, int, int]) -> tuple[torch.Tensor, Instances]:
    """Return a picture of a white square on black, and the square as an object."""
    mask = torch.zeros(1, *size, dtype=torch.bool)
    x0, y0, x1, y1 = box
    mask[:, y0:y1, x0:x1] = True
    objects = Instances(torch.tensor([0]), torch.tensor([box], dtype=torch.float32), Masks.from_dense(mask))
    return (mask * 255).to(torch.uint8).expand(3, -1, -1).contiguous(), objects


@pytest.mark.parametrize(
    ("size", "short", "long", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1066)),  # cut off, not rounded: 1066.67
        ((427, 640), 800, 1333, (800, 1199)),
        ((640, 427), 800, 1333, (1199, 800)),
        ((300, 1000), 800, 1333, (400, 1333)),
        ((500, 1500), 800, 1333, (444, 1332)),  # 1333 / 3 = 444.3 is rounded first
        ((600, 600), 800, 1333, (800, 800)),
        ((800, 1000), 800, 1333, (800, 1000)),
        ((302, 4000), 800, 1333, (101, 1337)),  # rounding the shorter side makes the longer one a little longer
        ((100, 5000), 600, None, (600, 30000)),
        # Beyond DETR's rule, which would ask for a height of zero or for a side of any length
        ((1, 5000), 800, 1333, (1, 1399)),
        ((5000, 1), 800, 1333, (1399, 1)),
        ((20, 5840), 800, 1333, (5, 1399)),
        ((1, 32768), 600, None, (600, 32768)),
    ],
)
def test_the_size_rule_is_detrs_within_limits(size, short, long, expected) -> None:
    assert fitted_size(size, short, long) == expected


@pytest.mark.parametrize("short_side", [37, 60, 113, 240])
def test_resized_pixels_are_pillows_within_one_level(shapes: ShapesDataset, short_side: int) -> None:
    pixels = shapes.image(0)
    got = fit(pixels, short_side).permute(1, 2, 0).numpy().astype(int)
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    expected = np.asarray(picture.resize((got.shape[1], got.shape[0]), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(got - expected).max() <= 1


def test_resizing_scales_boxes_by_the_real_ratios_and_masks_by_the_nearest_pixel(shapes: ShapesDataset) -> None:
    pixels, objects = shapes.read(1)
    resized, scaled = resize(pixels, objects, 95)
    assert resized.shape == (3, 95, 118)
    torch.testing.assert_close(scaled.boxes, objects.boxes * torch.tensor([1.18, 95 / 80, 1.18, 95 / 80]))
    dense = objects.masks.dense()[None].float()
    assert torch.equal(scaled.masks.dense(), torch.nn.functional.interpolate(dense, (95, 118))[0] > 0.5)


def test_flipping_twice_changes_nothing(shapes: ShapesDataset) -> None:
    pixels, objects = shapes.read(2)
    once = flip(pixels, objects)
    torch.testing.assert_close(once[1].boxes, once[1].masks.boxes())
    twice = flip(*once)
    assert torch.equal(twice[0], pixels)
    assert twice[1].masks == objects.masks
    torch.testing.assert_close(twice[1].boxes, objects.boxes)


def test_a_crop_shifts_and_cuts_boxes_and_drops_empty_ones(shapes: ShapesDataset) -> None:
    pixels, objects = shapes.read(0)
    inside = torch.tensor([[10.0, 10.0, 30.0, 30.0], [0.0, 0.0, 20.0, 80.0], [30.0, 30.0, 60.0, 60.0]])
    masks = Masks.from_dense(torch.ones(3, 80, 100, dtype=torch.bool))
    objects = replace(objects, labels=torch.arange(3), boxes=inside, masks=masks)
    part, remaining = crop(pixels, objects, (20, 5, 70, 25))
    assert torch.equal(part, pixels[:, 5:25, 20:70])
    assert remaining.labels.tolist() == [0]
    assert remaining.boxes[0].tolist() == [0, 5, 10, 20]
    assert remaining.masks.size == (20, 50)


def test_a_box_may_outlive_its_mask() -> None:
    pixels, objects = square((20, 20), (5, 5, 10, 10))
    wider = replace(objects, boxes=torch.tensor([[5.0, 5.0, 16.0, 16.0]]))
    remaining = crop(pixels, wider, (12, 12, 20, 20))[1]
    assert len(remaining) == 1
    assert remaining.masks.areas().tolist() == [0]


@pytest.mark.parametrize("name", ["detr", "mmdet", "lsj", "flip", "none"])
def test_pixels_boxes_and_masks_move_together(name) -> None:
    config = replace(DETR, augmentation=name, jitter_size=160, jitter_scale=(0.5, 2.0))
    for seed in range(40):
        pixels, objects = augment(*square((120, 180), (40, 30, 100, 80)), config, np.random.default_rng(seed))
        assert objects.masks.size == pixels.shape[1:]
        if len(objects) and (mask := objects.masks.dense()[0]).any():
            torch.testing.assert_close(objects.boxes, objects.masks.boxes(), atol=4, rtol=0)
            white = pixels[0] > 127
            x0, y0, x1, y1 = objects.boxes[0].tolist()
            assert (white ^ mask).sum() <= 5 * (x1 - x0 + y1 - y0)  # nearest neighbor shifts by up to half a pixel, each time
        else:
            assert (pixels > 127).float().mean() < 0.05


def test_the_same_random_numbers_give_the_same_picture(shapes: ShapesDataset) -> None:
    def augmented(seed: int) -> torch.Tensor:
        return augment(*shapes.read(0), DETR, np.random.default_rng(seed))[0]

    assert torch.equal(augmented(3), augmented(3))
    assert any(augmented(3).shape != augmented(i).shape or not torch.equal(augmented(3), augmented(i)) for i in range(4, 8))


@pytest.mark.parametrize("name", ["detr", "mmdet"])
def test_detrs_policies_flip_half_crop_half_and_keep_to_their_sizes(name) -> None:
    flipped, cropped, sides = 0, 0, set()
    config = replace(DETR, augmentation=name)
    for seed in range(300):
        pixels, objects = augment(*square((90, 120), (0, 0, 60, 90)), config, np.random.default_rng(seed))
        height, width = pixels.shape[1:]
        assert max(height, width) <= 180
        sides.add(min(height, width))
        if abs(width / height - 4 / 3) < 0.02:
            flipped += bool(objects.boxes[0, 0] > 1)
        else:
            cropped += 1
    assert {96, 112} <= sides
    assert 0.4 < cropped / 300 < 0.6
    assert 0.35 < flipped / (300 - cropped) < 0.65


@pytest.mark.parametrize(("name", "times"), [("detr", {2, 3}), ("mmdet", {1, 2})])
def test_mmdetections_policy_scales_an_image_once_less(name, times, monkeypatch) -> None:
    scaled = set()
    for seed in range(20):
        calls = []
        monkeypatch.setattr("maskset.data.transforms.resize", lambda *args, calls=calls: calls.append(1) or resize(*args))
        augment(*square((90, 120), (0, 0, 60, 90)), replace(DETR, augmentation=name), np.random.default_rng(seed))
        scaled.add(len(calls))
    assert scaled == times


def test_a_crop_range_beyond_the_image_is_cut_to_it() -> None:
    config = replace(DETR, crop_short_sides=(30,), crop_range=(384, 600))
    for seed in range(10):
        pixels, _ = augment(*square((90, 120), (0, 0, 60, 90)), config, np.random.default_rng(seed))
        assert abs(pixels.shape[2] / pixels.shape[1] - 4 / 3) < 0.06  # rounded thrice


def test_a_crop_may_be_a_share_of_the_image() -> None:
    config = replace(DETR, augmentation="mmdet", crop_short_sides=(30,), crop_fraction=0.7, short_sides=(60,))
    heights = set()
    for seed in range(9):
        _, objects = augment(*square((30, 40), (18, 13, 22, 17)), config, np.random.default_rng(seed))
        heights.add(round(float(objects.boxes[0, 3] - objects.boxes[0, 1]), 3))
    assert heights == {round(4 * 60 / 30, 3), round(4 * 60 / 21, 3)}  # the whole image, and 0.7 of it


def test_large_scale_jitter_keeps_to_its_canvas_and_scales() -> None:
    config = replace(DETR, augmentation="lsj", jitter_size=64, jitter_scale=(0.1, 2.0))
    sizes = [augment(*square((60, 90), (0, 0, 90, 60)), config, np.random.default_rng(s))[0].shape[1:] for s in range(200)]
    assert max(max(size) for size in sizes) == 64
    assert min(max(size) for size in sizes) < 12
    assert 0.4 < sum(size[1] == 64 for size in sizes) / 200 < 0.65  # a scale above 1 fills the canvas


def test_nothing_changes_nothing(shapes: ShapesDataset) -> None:
    pixels, objects = shapes.read(3)
    got = augment(pixels, objects, replace(DETR, augmentation="none"), np.random.default_rng(0))
    assert got[0] is pixels
    assert got[1] is objects
