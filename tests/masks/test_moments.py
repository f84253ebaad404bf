import pytest
import torch

from maskset.instances import Masks
from maskset.masks.moments import centres_of_mass


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (7, 5), (40, 33)])
def test_the_centre_is_the_mean_of_the_pixels(size):
    torch.manual_seed(0)
    masks = torch.rand(6, *size) > torch.tensor([-1, 0.2, 0.5, 0.8, 0.99, 2])[:, None, None]
    areas, centres = centres_of_mass(Masks.from_dense(masks))
    for mask, area, centre in zip(masks, areas, centres, strict=True):
        pixels = mask.nonzero()
        assert area == len(pixels)
        wanted = pixels.sum(0).float() / len(pixels) if len(pixels) else torch.zeros(2)
        assert torch.equal(centre, wanted)


def test_sums_beyond_what_float32_counts_are_exact():
    masks = torch.ones(1, 3001, 4001, dtype=torch.bool)
    areas, centres = centres_of_mass(Masks.from_dense(masks))
    assert areas.tolist() == [3001 * 4001]
    assert centres.tolist() == [[1500, 2000]]


def test_of_no_mask_there_is_none():
    areas, centres = centres_of_mass(Masks([], (4, 5)))
    assert (areas.shape, centres.shape) == ((0,), (0, 2))
