import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import roi_align

from maskset.instances import Masks
from maskset.masks.boxed import binarise, crop, paste


def random_boxes(count, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([width, height]) * 0.8 - 3
    size = torch.rand(count, 2, generator=generator) * torch.tensor([width, height]) * 0.7 + 0.3
    return torch.cat([corner, corner + size], 1)


def pasted_over_the_whole_image(masks, boxes, size):
    """The rule pixel by pixel: sample the box-local mask at every pixel centre, zero outside."""
    height, width = size
    x = torch.arange(width)[None, :] + 0.5
    y = torch.arange(height)[None, :] + 0.5
    grid_x = (x - boxes[:, 0:1]) / (boxes[:, 2:3] - boxes[:, 0:1]) * 2 - 1
    grid_y = (y - boxes[:, 1:2]) / (boxes[:, 3:4] - boxes[:, 1:2]) * 2 - 1
    grid = torch.stack([grid_x[:, None, :].expand(-1, height, -1), grid_y[:, :, None].expand(-1, -1, width)], -1)
    return F.grid_sample(masks.float()[:, None], grid, align_corners=False)[:, 0] >= 0.5


@pytest.mark.parametrize("seed", range(5))
def test_pasting_is_sampling_at_every_pixel(seed):
    masks = torch.rand(20, 14, 14, generator=torch.Generator().manual_seed(seed)) > 0.5
    boxes = random_boxes(20, 60, 80, seed)
    expected = pasted_over_the_whole_image(masks, boxes, (60, 80))
    found = paste(masks, boxes, (60, 80)).dense()
    assert (found != expected).sum() <= 1  # a sample of exactly 0.5 may fall either way


def test_boxes_outside_turned_around_or_not_finite_paste_nothing():
    boxes = torch.tensor([[200.0, 3, 220, 9], [5, 5, 5, 5], [9, 9, 3, 3], [torch.nan, 0, 5, 5], [-50, -50, -20, -20]])
    masks = paste(torch.ones(5, 8, 8, dtype=torch.bool), boxes, (30, 40))
    assert masks.areas().tolist() == [0, 0, 0, 0, 0]
    assert masks.size == (30, 40)


def test_a_huge_box_covers_the_image():
    masks = paste(torch.ones(1, 8, 8, dtype=torch.bool), torch.tensor([[-1e6, -1e6, 1e6, 1e6]]), (30, 40))
    assert masks.areas().tolist() == [1200]


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


def test_the_threshold_is_the_middle_of_each_mask():
    fields = torch.tensor([[[0.0, 1], [0.4, 0.6]], [[-3.0, -1], [-2, -1.9]], [[5.0, 5], [5, 5]]])
    expected = [[[False, True], [False, True]], [[False, True], [False, True]], [[False, False], [False, False]]]
    assert binarise(fields).tolist() == expected


def test_a_mask_without_a_box_is_refused():
    with pytest.raises(ValueError, match="got 1 boxes and 2 masks"):
        crop(Masks.from_dense(torch.ones(2, 4, 4, dtype=torch.bool)), torch.tensor([[0.0, 0, 4, 4]]), 7)
