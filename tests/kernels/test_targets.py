"""Training targets computed in C against the plain versions, bit for bit, and against float64."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import roi_align

from maskset.instances import Masks
from maskset.masks.resize import align_corners, resample
from maskset.masks.targets import crop, downsample_by_4_opencv, downsample_by_stride, resize_align_corners


def some_masks(seed: int) -> Masks:
    """Return blobs and noise, as they were drawn or flipped, scaled and cropped."""
    generator = torch.Generator().manual_seed(seed)
    blobs = F.interpolate(torch.randn(1, 4, 4, 4, generator=generator), (53, 67), mode="bicubic")[0] > 0.3
    masks = Masks.from_dense(torch.cat([blobs, torch.rand(2, 53, 67, generator=generator) > 0.4, torch.ones(1, 53, 67) > 0]))
    return [masks, masks.flipped(), masks.scaled((90, 40)), masks.scaled((31, 80)).flipped().cropped((3, 5, 70, 30))][seed % 4]


def boxes_around(masks: Masks, seed: int) -> torch.Tensor:
    generator, sides = torch.Generator().manual_seed(seed), torch.tensor(masks.size[::-1])
    corners = torch.rand(len(masks), 2, generator=generator) * sides * 1.2 - 5
    boxes = torch.cat([corners, corners + torch.rand(len(masks), 2, generator=generator) * sides], 1)
    return [boxes, boxes.round(), (boxes * 4).round() / 4, torch.minimum(boxes.clamp(min=0), sides.repeat(2))][seed // 4 % 4]


@pytest.mark.parametrize("size", [1, 7, 28, 128])
@pytest.mark.parametrize("seed", range(16))
def test_a_crop_is_what_the_plain_version_crops(both, size, seed):
    masks = some_masks(seed)
    boxes = boxes_around(masks, seed)
    found, expected = both(lambda: crop(masks, boxes, size))
    assert torch.equal(found, expected)


def test_a_crop_differs_from_float64_only_where_a_mean_is_one_half():
    masks = some_masks(1)
    boxes = boxes_around(masks, 1)
    rois = torch.cat([torch.arange(len(masks))[:, None], boxes], 1).double()
    means = roi_align(masks.dense()[:, None].double(), rois, 28, aligned=True)[:, 0]
    assert ((means >= 0.5) == crop(masks, boxes, 28))[(means - 0.5).abs() > 1e-3].all()


def test_boxes_that_are_none_crop_nothing(both):
    strange = [[5, 5, 5, 9], [9, 9, 3, 3], [torch.nan, 0, 5, 5], [-torch.inf, 0, 5, 5], [0, 0, torch.inf, 5], [90, 90, 95, 99]]
    masks = Masks.from_dense(torch.ones(len(strange), 20, 30, dtype=torch.bool))
    for found in both(lambda: crop(masks, torch.tensor(strange), 8)):
        assert not found.any()
    assert not crop(masks[:1], torch.tensor([[-1e30, -1e30, 1e30, 1e30]]), 8).any()


@pytest.mark.parametrize("seed", range(8))
def test_coarser_masks_are_what_the_plain_versions_make(both, seed):
    masks = some_masks(seed)
    height, width = masks.size
    for work in (
        lambda: downsample_by_stride(masks, 4, (height // 4 + 2, width // 4 + 3)),
        lambda: downsample_by_stride(masks, 8, (height // 8 + 1, width // 8 + 1)),
        lambda: downsample_by_4_opencv(masks, (height // 4 + 2, width // 4 + 3)),
        lambda: resize_align_corners(masks, (height + 7, width + 3), (33, 21), torch.device("cpu")),
        lambda: resize_align_corners(masks, (height, width), (111, 150), torch.device("cpu")),
    ):
        found, expected = both(work)
        assert torch.equal(found, expected)


def test_stretched_masks_are_those_of_float64_but_for_rounding():
    masks = some_masks(2)
    padded = F.pad(masks.dense().double(), (0, 6, 0, 4))
    expected = resample(padded, align_corners(padded.shape[1], 40), align_corners(padded.shape[2], 30))
    found = resize_align_corners(masks, (padded.shape[1], padded.shape[2]), (40, 30), torch.device("cpu"))
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)
