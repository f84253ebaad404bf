"""Resizing maps and painting masks, compared with PyTorch's own resizing of whole maps."""

import pytest
import torch
import torch.nn.functional as F

from maskset.instances import Masks
from maskset.masks.resample import by_centres, by_corners, by_factor, paint, resample


def blobs(count: int = 6, size: tuple[int, int] = (13, 17)) -> torch.Tensor:
    """Return smooth random logits, mostly below zero, so that objects have borders."""
    torch.manual_seed(0)
    return F.interpolate(torch.randn(1, count, 4, 5), size, mode="bicubic")[0] * 3 - 1


@pytest.mark.parametrize("size", [(26, 34), (9, 5), (13, 17), (40, 1)])
@pytest.mark.parametrize(("rule", "align"), [(by_corners, True), (by_centres, False)])
def test_a_resize_is_pytorchs(size, rule, align):
    maps = blobs()
    found = resample(maps, rule(13, size[0]), rule(17, size[1]))
    expected = F.interpolate(maps[None], size, mode="bilinear", align_corners=align)[0]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_aligned_upsampling_shows_cell_i_at_pixel_4i_plus_2():
    found = resample(torch.arange(5.0)[None, None], by_factor(1, 4), by_factor(5, 4))[0, 0]
    assert found.tolist() == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.25, 2.5, 2.75, 3, 3.25, 3.5, 3.75, 4, 4]


@pytest.mark.parametrize("size", [(50, 70), (11, 90), (7, 6)])
def test_painting_windows_equals_painting_everything(size):
    logits = blobs(12)
    logits[3] = -1  # nothing to paint
    logits[4] = 1  # the whole image
    logits[5] = -1
    logits[5, -1, -1] = 9  # a corner
    middle = (26, 34)
    steps = [
        (by_factor(13, 4), by_factor(17, 4)),
        torch.sigmoid,
        (by_corners(52, middle[0]), by_corners(68, middle[1])),
        (by_centres(middle[0], size[0]), by_centres(middle[1], size[1])),
    ]
    whole = logits
    for step in steps:
        whole = resample(whole, *step) if isinstance(step, tuple) else step(whole)
    found = paint(logits, steps, least=0.0)
    assert found == Masks.from_dense(whole > 0.5)
    assert found.areas().tolist()[3:5] == [0, size[0] * size[1]]


def test_a_resize_may_show_only_the_valid_part():
    logits = blobs(3)
    steps = [(by_corners(10, 30), by_corners(11, 33)), torch.sigmoid]
    found = paint(logits, steps, least=0.0)
    expected = F.interpolate(logits[None, :, :10, :11], (30, 33), mode="bilinear", align_corners=True)[0] > 0
    assert (found.dense() != expected).sum() <= 2


def test_no_map_gives_no_mask():
    assert len(paint(torch.zeros(0, 4, 4), [(by_centres(4, 8), by_centres(4, 8))], least=0.5)) == 0
