"""Mask targets: each function compared with the operation of the official code, or with a loop written from its rule."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import roi_align

from maskset.errors import MasksetError
from maskset.instances import Masks
from maskset.masks import targets
from maskset.masks.resize import align_corners, resample
from maskset.masks.targets import centers_of_mass, crop, downsample_by_4_opencv, downsample_by_stride, resize_align_corners


def noise(count: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(count, height, width, generator=torch.Generator().manual_seed(0)) > 0.5


def random_boxes(count, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([width, height]) * 0.8 - 3
    size = torch.rand(count, 2, generator=generator) * torch.tensor([width, height]) * 0.7 + 0.3
    return torch.cat([corner, corner + size], 1)


@pytest.mark.parametrize("size", [7, 28])
def test_a_crop_is_roi_align_of_the_whole_mask(size):
    dense = torch.rand(12, 50, 70, generator=torch.Generator().manual_seed(1)) > 0.4
    boxes = random_boxes(12, 50, 70)
    rois = torch.cat([torch.arange(12.0)[:, None], boxes], 1)
    expected = roi_align(dense[:, None].float(), rois, size, aligned=True)[:, 0] >= 0.5
    assert (crop(Masks.from_dense(dense), boxes, size) != expected).float().mean() < 1e-3  # means of exactly 0.5


def test_a_crop_of_an_augmented_view_is_the_crop_of_its_pixels():
    view = Masks.from_dense(torch.rand(3, 30, 40) > 0.5).flipped().scaled((60, 50)).cropped((5, 7, 45, 52))
    boxes = random_boxes(3, 45, 40)
    assert torch.equal(crop(view, boxes, 16), crop(Masks.from_dense(view.dense()), boxes, 16))


def test_a_thousand_objects_and_none_are_cropped():
    dense = torch.zeros(1, 64, 64, dtype=torch.bool)
    dense[0, 10:30, 20:50] = True
    masks = Masks.from_dense(dense)
    many = masks[[0] * 1000]
    assert crop(many, many.boxes(), 8).all()
    assert crop(masks[[]], torch.zeros(0, 4), 8).shape == (0, 8, 8)


def test_a_mask_without_a_box_is_refused():
    with pytest.raises(MasksetError, match=r"shape \[2, 4\], got \[1, 4\]"):
        crop(Masks.from_dense(torch.ones(2, 4, 4, dtype=torch.bool)), torch.tensor([[0.0, 0, 4, 4]]), 7)


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("size", [(64, 96), (50, 75), (33, 32), (1, 3)])
def test_downsampling_by_stride_is_a_bilinear_resize_of_the_padded_mask(factor, size):
    dense = noise(3, *size)
    canvas = [-(-side // 32) * 32 for side in size]
    padded = F.pad(dense.float(), (0, canvas[1] - size[1], 0, canvas[0] - size[0]))
    expected = F.interpolate(padded[None], scale_factor=1 / factor, mode="bilinear", align_corners=False)[0]
    means = downsample_by_stride(Masks.from_dense(dense), factor, (canvas[0] // factor, canvas[1] // factor))
    assert torch.equal(means, expected)


def test_downsampling_by_stride_gives_zero_for_padding():
    means = downsample_by_stride(Masks.from_dense(torch.ones(1, 32, 32, dtype=torch.bool)), 4, (16, 24))
    assert means[0, :8, :8].eq(1).all()
    assert means.sum() == 64


def test_downsampling_by_stride_does_not_depend_on_how_many_masks_are_decoded_at_a_time(monkeypatch):
    masks = Masks.from_dense(noise(7, 40, 24))
    expected = downsample_by_stride(masks, 4, (16, 8))
    monkeypatch.setattr(targets, "_MAX_PIXELS", 2 * 40 * 24)
    monkeypatch.setenv("MASKSET_NATIVE", "off")
    assert torch.equal(downsample_by_stride(masks, 4, (16, 8)), expected)


def test_downsampling_by_stride_is_equal_for_flipped_polygons_and_their_pixels():
    masks = Masks.from_polygons([[torch.tensor([[2.0, 2], [20, 2], [20, 12], [2, 12]]).numpy()]], (32, 32)).flipped()
    assert torch.equal(downsample_by_stride(masks, 4, (8, 8)), downsample_by_stride(Masks.from_dense(masks.dense()), 4, (8, 8)))


def test_downsampling_by_stride_gives_nothing_for_no_masks():
    assert downsample_by_stride(Masks([], (32, 64)), 4, (8, 16)).shape == (0, 8, 16)


@pytest.mark.parametrize("size", [(50, 40), (9, 70), (1, 1)])
def test_a_resize_with_aligned_corners_is_pytorchs_of_the_padded_mask(size):
    dense = noise(3, 33, 61)
    padded = F.pad(dense.float(), (0, 3, 0, 7))
    expected = F.interpolate(padded[None], size, mode="bilinear", align_corners=True)[0]
    resized = resize_align_corners(Masks.from_dense(dense), (40, 64), size, torch.device("cpu"))
    torch.testing.assert_close(resized, expected, atol=2e-5, rtol=0)
    assert torch.equal(resized, resample(padded, align_corners(40, size[0]), align_corners(64, size[1])))


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (7, 5), (40, 33)])
def test_the_center_of_mass_is_the_mean_of_the_pixels(size):
    torch.manual_seed(0)
    masks = torch.rand(6, *size) > torch.tensor([-1, 0.2, 0.5, 0.8, 0.99, 2])[:, None, None]
    areas, centers = centers_of_mass(Masks.from_dense(masks))
    for mask, area, center in zip(masks, areas, centers, strict=True):
        pixels = mask.nonzero()
        assert area == len(pixels)
        assert torch.equal(center, pixels.sum(0).float() / len(pixels) if len(pixels) else torch.zeros(2))


def test_centers_of_mass_are_exact_beyond_what_float32_counts():
    masks = torch.ones(1, 3001, 4001, dtype=torch.bool)
    areas, centers = centers_of_mass(Masks.from_dense(masks))
    assert areas.tolist() == [3001 * 4001]
    assert centers.tolist() == [[1500, 2000]]


def test_no_masks_have_no_centers_of_mass():
    areas, centers = centers_of_mass(Masks([], (4, 5)))
    assert (areas.shape, centers.shape) == ((0,), (0, 2))


def opencv_taps(pixels: int, cells: int) -> list[tuple[int, int, int, int]]:
    """Return for each cell the two pixels that it reads, and their weights in units of 1 / 2048."""
    taps = []
    for cell in range(cells):
        share = np.float32((cell + 0.5) * pixels / cells - 0.5)
        low = int(np.floor(share))
        share = share - np.float32(low)
        if low < 0:
            low, share = 0, np.float32(0)
        if low >= pixels - 1:
            low, share = pixels - 1, np.float32(0)
        weights = int(np.rint((np.float32(1) - share) * np.float32(2048))), int(np.rint(share * np.float32(2048)))
        taps.append((low, min(low + 1, pixels - 1), *weights))
    return taps


def opencv_resize(mask: np.ndarray) -> np.ndarray:
    """Return cv2.resize(mask, (int(w / 4 + 0.5), int(h / 4 + 0.5))), pixel by pixel, in OpenCV's whole numbers."""
    height, width = mask.shape
    rows, columns = opencv_taps(height, int(height / 4 + 0.5)), opencv_taps(width, int(width / 4 + 0.5))
    result = np.zeros((len(rows), len(columns)), dtype=bool)
    for i, (top, bottom, b0, b1) in enumerate(rows):
        for j, (left, right, a0, a1) in enumerate(columns):
            upper = a0 * int(mask[top, left]) + a1 * int(mask[top, right])
            lower = a0 * int(mask[bottom, left]) + a1 * int(mask[bottom, right])
            result[i, j] = (((b0 * (upper >> 4)) >> 16) + ((b1 * (lower >> 4)) >> 16) + 2) >> 2
    return result


SIZES = [(8, 12), (9, 13), (10, 14), (11, 15), (1, 1), (1, 30), (2, 3), (3, 2), (5, 6), (37, 53), (64, 80), (61, 7)]


@pytest.mark.parametrize("size", SIZES)
def test_every_pixel_downsampled_by_4_is_opencvs(size):
    torch.manual_seed(0)
    large = torch.zeros(2, *size, dtype=torch.bool)
    large[0, size[0] // 3 :, size[1] // 4 : size[1] // 2 + 1] = True
    large[1] = True
    masks = torch.cat([torch.rand(3, *size) > 0.5, large])
    canvas = (-(-size[0] // 4) + 2, -(-size[1] // 4) + 3)
    for mask, quarter in zip(masks, downsample_by_4_opencv(Masks.from_dense(masks), canvas), strict=True):
        expected = opencv_resize(mask.numpy())
        assert np.array_equal(quarter[: expected.shape[0], : expected.shape[1]].numpy(), expected)
        assert not quarter[expected.shape[0] :].any()
        assert not quarter[:, expected.shape[1] :].any()


def test_downsampling_by_4_of_multiples_of_four_is_a_bilinear_resize_rounded_up_at_one_half():
    torch.manual_seed(0)
    masks = torch.rand(20, 24, 32) > 0.5
    expected = F.interpolate(masks.float()[None], size=(6, 8), mode="bilinear")[0] >= 0.5
    assert torch.equal(downsample_by_4_opencv(Masks.from_dense(masks), (6, 8)), expected)


def test_a_small_object_may_have_no_cell_after_downsampling_by_4():
    masks = torch.zeros(1, 16, 16, dtype=torch.bool)
    masks[0, 4, 4] = True
    assert not downsample_by_4_opencv(Masks.from_dense(masks), (4, 4)).any()


def test_downsampling_by_4_gives_nothing_for_no_masks_and_empty_masks():
    assert downsample_by_4_opencv(Masks([], (16, 20)), (8, 8)).shape == (0, 8, 8)
    empty = Masks.from_dense(torch.zeros(2, 16, 20, dtype=torch.bool))
    assert not downsample_by_4_opencv(empty, (4, 5)).any()


def test_downsampling_by_4_is_equal_for_flipped_polygons_and_their_pixels():
    triangle = (np.array([[3.0, 2.0], [17.0, 2.0], [11.0, 13.0]]),)
    masks = Masks.from_polygons([triangle], (18, 22)).flipped()
    assert torch.equal(downsample_by_4_opencv(masks, (5, 6)), downsample_by_4_opencv(Masks.from_dense(masks.dense()), (5, 6)))
    assert downsample_by_4_opencv(masks, (5, 6)).any()
