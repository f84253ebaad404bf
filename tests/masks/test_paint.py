"""Pasting and painting, compared with the same rule applied to every pixel of the whole image."""

import pytest
import torch
import torch.nn.functional as F

from maskset.instances import Masks
from maskset.masks.paint import binarize, paint, paste, paste_soft
from maskset.masks.resize import align_corners, aligned_bilinear, half_pixel, resample


def random_boxes(count, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([width, height]) * 0.8 - 3
    size = torch.rand(count, 2, generator=generator) * torch.tensor([width, height]) * 0.7 + 0.3
    return torch.cat([corner, corner + size], 1)


def paste_over_the_whole_image(masks, boxes, size):
    """Sample the box-local mask at every pixel's center, with zeros outside."""
    height, width = size
    x = torch.arange(width)[None, :] + 0.5
    y = torch.arange(height)[None, :] + 0.5
    grid_x = (x - boxes[:, 0:1]) / (boxes[:, 2:3] - boxes[:, 0:1]) * 2 - 1
    grid_y = (y - boxes[:, 1:2]) / (boxes[:, 3:4] - boxes[:, 1:2]) * 2 - 1
    grid = torch.stack([grid_x[:, None, :].expand(-1, height, -1), grid_y[:, :, None].expand(-1, -1, width)], -1)
    return F.grid_sample(masks.float()[:, None], grid, align_corners=False)[:, 0] >= 0.5


@pytest.mark.parametrize("seed", range(5))
def test_pasting_samples_at_every_pixel(seed):
    masks = torch.rand(20, 14, 14, generator=torch.Generator().manual_seed(seed)) > 0.5
    boxes = random_boxes(20, 60, 80, seed)
    expected = paste_over_the_whole_image(masks, boxes, (60, 80))
    assert (paste(masks, boxes, (60, 80)).dense() != expected).sum() <= 1  # a sample of exactly 0.5 may fall either way


def test_boxes_that_are_outside_inverted_or_not_finite_paste_nothing():
    boxes = torch.tensor([[200.0, 3, 220, 9], [5, 5, 5, 5], [9, 9, 3, 3], [torch.nan, 0, 5, 5], [-50, -50, -20, -20]])
    masks = paste(torch.ones(5, 8, 8, dtype=torch.bool), boxes, (30, 40))
    assert masks.areas().tolist() == [0, 0, 0, 0, 0]
    assert masks.size == (30, 40)


def test_a_huge_box_covers_the_image():
    masks = paste(torch.ones(1, 8, 8, dtype=torch.bool), torch.tensor([[-1e6, -1e6, 1e6, 1e6]]), (30, 40))
    assert masks.areas().tolist() == [1200]


def test_the_threshold_is_the_middle_of_each_mask():
    fields = torch.tensor([[[0.0, 1], [0.4, 0.6]], [[-3.0, -1], [-2, -1.9]], [[5.0, 5], [5, 5]]])
    expected = [[[False, True], [False, True]], [[False, True], [False, True]], [[False, False], [False, False]]]
    assert binarize(fields).tolist() == expected


@pytest.mark.parametrize("native", ["on", "off"])
def test_fields_of_nan_give_empty_masks(native, monkeypatch):
    monkeypatch.setenv("MASKSET_NATIVE", native)
    fields = torch.full((1, 8, 8), torch.nan)
    boxes = torch.tensor([[2.0, 2, 20, 20]])
    resize = [(half_pixel(8, 30), half_pixel(8, 40))]
    for masks in (paste(binarize(fields), boxes, (30, 40)), paste_soft(fields, boxes, (30, 40), 0.5), paint(fields, resize, 0.5)):
        assert masks.areas().tolist() == [0]


def blobs(count: int = 6, size: tuple[int, int] = (13, 17)) -> torch.Tensor:
    """Return smooth random logits, mostly below zero, so that objects have borders."""
    torch.manual_seed(0)
    return F.interpolate(torch.randn(1, count, 4, 5), size, mode="bicubic")[0] * 3 - 1


@pytest.mark.parametrize("size", [(50, 70), (11, 90), (7, 6)])
def test_painting_windows_equals_painting_everything(size):
    logits = blobs(12)
    logits[3] = -1  # nothing to paint
    logits[4] = 1  # the whole image
    logits[5] = -1
    logits[5, -1, -1] = 9  # a corner
    middle = (26, 34)
    steps = [
        (aligned_bilinear(13, 4), aligned_bilinear(17, 4)),
        torch.sigmoid,
        (align_corners(52, middle[0]), align_corners(68, middle[1])),
        (half_pixel(middle[0], size[0]), half_pixel(middle[1], size[1])),
    ]
    whole = logits
    for step in steps:
        whole = resample(whole, *step) if isinstance(step, tuple) else step(whole)
    masks = paint(logits, steps, cutoff=0.0)
    assert masks == Masks.from_dense(whole > 0.5)
    assert masks.areas().tolist()[3:5] == [0, size[0] * size[1]]


def test_a_resize_may_read_only_the_valid_part():
    logits = blobs(3)
    steps = [(align_corners(10, 30), align_corners(11, 33)), torch.sigmoid]
    masks = paint(logits, steps, cutoff=0.0)
    expected = F.interpolate(logits[None, :, :10, :11], (30, 33), mode="bilinear", align_corners=True)[0] > 0
    assert (masks.dense() != expected).sum() <= 2


def test_no_map_gives_no_mask():
    assert len(paint(torch.zeros(0, 4, 4), [(half_pixel(4, 8), half_pixel(4, 8))], cutoff=0.5)) == 0
