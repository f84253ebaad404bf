import pytest
import torch
import torch.nn.functional as F

from maskset.masks.resize import align_corners, aligned_bilinear, half_pixel, resample


@pytest.mark.parametrize("size", [(26, 34), (9, 5), (13, 17), (40, 1)])
@pytest.mark.parametrize(("rule", "align"), [(align_corners, True), (half_pixel, False)])
def test_a_resize_is_pytorchs(size, rule, align):
    maps = torch.randn(6, 13, 17, generator=torch.Generator().manual_seed(0))
    resized = resample(maps, rule(13, size[0]), rule(17, size[1]))
    expected = F.interpolate(maps[None], size, mode="bilinear", align_corners=align)[0]
    torch.testing.assert_close(resized, expected, atol=2e-5, rtol=0)


def test_aligned_upsampling_by_4_puts_cell_i_at_pixel_4i_plus_2():
    row = resample(torch.arange(5.0)[None, None], aligned_bilinear(1, 4), aligned_bilinear(5, 4))[0, 0]
    assert row.tolist() == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.25, 2.5, 2.75, 3, 3.25, 3.5, 3.75, 4, 4]
