"""Quarter masks against a loop over pixels written from OpenCV's arithmetic in whole numbers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from maskset.instances import Masks
from maskset.masks.quarter import quarter_masks


def taps(n: int, m: int) -> list[tuple[int, int, int, int]]:
    """Return for each of m cells the two pixels of n that it looks at, and their weights in 2048ths."""
    found = []
    for d in range(m):
        f = np.float32((d + 0.5) * n / m - 0.5)
        s = int(np.floor(f))
        f = f - np.float32(s)
        if s < 0:
            s, f = 0, np.float32(0)
        if s >= n - 1:
            s, f = n - 1, np.float32(0)
        weights = int(np.rint((np.float32(1) - f) * np.float32(2048))), int(np.rint(f * np.float32(2048)))
        found.append((s, min(s + 1, n - 1), *weights))
    return found


def slow(mask: np.ndarray) -> np.ndarray:
    """Return cv2.resize(mask, (int(w / 4 + 0.5), int(h / 4 + 0.5))), pixel by pixel."""
    height, width = mask.shape
    rows, columns = taps(height, int(height / 4 + 0.5)), taps(width, int(width / 4 + 0.5))
    result = np.zeros((len(rows), len(columns)), dtype=bool)
    for i, (top, bottom, b0, b1) in enumerate(rows):
        for j, (left, right, a0, a1) in enumerate(columns):
            upper = a0 * int(mask[top, left]) + a1 * int(mask[top, right])
            lower = a0 * int(mask[bottom, left]) + a1 * int(mask[bottom, right])
            result[i, j] = (((b0 * (upper >> 4)) >> 16) + ((b1 * (lower >> 4)) >> 16) + 2) >> 2
    return result


SIZES = [(8, 12), (9, 13), (10, 14), (11, 15), (1, 1), (1, 30), (2, 3), (3, 2), (5, 6), (37, 53), (64, 80), (61, 7)]


@pytest.mark.parametrize("size", SIZES)
def test_every_pixel_is_opencvs(size):
    torch.manual_seed(0)
    noise = torch.rand(3, *size) > 0.5
    large = torch.zeros(2, *size, dtype=torch.bool)
    large[0, size[0] // 3 :, size[1] // 4 : size[1] // 2 + 1] = True
    large[1] = True
    masks = torch.cat([noise, large])
    canvas = (-(-size[0] // 4) + 2, -(-size[1] // 4) + 3)
    found = quarter_masks(Masks.from_dense(masks), canvas)
    for mask, one in zip(masks, found, strict=True):
        wanted = slow(mask.numpy())
        assert np.array_equal(one[: wanted.shape[0], : wanted.shape[1]].numpy(), wanted)
        assert not one[wanted.shape[0] :].any()
        assert not one[:, wanted.shape[1] :].any()


def test_on_multiples_of_four_it_is_bilinear_resizing_rounded_up_at_one_half():
    torch.manual_seed(0)
    masks = torch.rand(20, 24, 32) > 0.5
    wanted = F.interpolate(masks.float()[None], size=(6, 8), mode="bilinear")[0] >= 0.5
    assert torch.equal(quarter_masks(Masks.from_dense(masks), (6, 8)), wanted)


def test_a_small_object_may_have_no_cell():
    masks = torch.zeros(1, 16, 16, dtype=torch.bool)
    masks[0, 4, 4] = True
    assert not quarter_masks(Masks.from_dense(masks), (4, 4)).any()


def test_no_mask_and_an_empty_one():
    assert quarter_masks(Masks([], (16, 20)), (8, 8)).shape == (0, 8, 8)
    empty = Masks.from_dense(torch.zeros(2, 16, 20, dtype=torch.bool))
    assert not quarter_masks(empty, (4, 5)).any()


def test_flipped_polygons_are_resized_as_what_they_show():
    square = (np.array([[3.0, 2.0], [17.0, 2.0], [11.0, 13.0]]),)
    masks = Masks.from_polygons([square], (18, 22)).flipped()
    assert torch.equal(quarter_masks(masks, (5, 6)), quarter_masks(Masks.from_dense(masks.dense()), (5, 6)))
    assert quarter_masks(masks, (5, 6)).any()
