import pytest
import torch
import torch.nn.functional as F

from maskset.instances import Masks
from maskset.masks import soft
from maskset.masks.soft import central_means


def noise(count: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(count, height, width, generator=torch.Generator().manual_seed(0)) > 0.5


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("size", [(64, 96), (50, 75), (33, 32), (1, 3)])
def test_it_is_bilinear_resizing_of_the_padded_mask(factor, size):
    dense = noise(3, *size)
    canvas = [-(-side // 32) * 32 for side in size]
    padded = F.pad(dense.float(), (0, canvas[1] - size[1], 0, canvas[0] - size[0]))
    expected = F.interpolate(padded[None], scale_factor=1 / factor, mode="bilinear", align_corners=False)[0]
    found = central_means(Masks.from_dense(dense), factor, (canvas[0] // factor, canvas[1] // factor))
    assert torch.equal(found, expected)


def test_what_the_batch_pads_is_zero():
    found = central_means(Masks.from_dense(torch.ones(1, 32, 32, dtype=torch.bool)), 4, (16, 24))
    assert found[0, :8, :8].eq(1).all()
    assert found.sum() == 64


def test_few_masks_at_a_time_are_all_masks(monkeypatch):
    masks = Masks.from_dense(noise(7, 40, 24))
    expected = central_means(masks, 4, (16, 8))
    monkeypatch.setattr(soft, "_PIXELS", 2 * 40 * 24)
    assert torch.equal(central_means(masks, 4, (16, 8)), expected)


def test_polygons_and_flipped_masks_are_read_as_they_look():
    masks = Masks.from_polygons([[torch.tensor([[2.0, 2], [20, 2], [20, 12], [2, 12]]).numpy()]], (32, 32)).flipped()
    assert torch.equal(central_means(masks, 4, (8, 8)), central_means(Masks.from_dense(masks.dense()), 4, (8, 8)))


def test_no_mask_has_no_mean():
    assert central_means(Masks([], (32, 64)), 4, (8, 16)).shape == (0, 8, 16)
