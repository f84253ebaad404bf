"""The feature pyramid."""

import torch
import torch.nn.functional as F

from maskset.layers.backbone import FeaturePyramid


def test_a_level_is_its_map_and_all_coarser_ones():
    torch.manual_seed(0)
    pyramid = FeaturePyramid([3, 4, 5], 8)
    maps = [torch.randn(2, channels, 16 // 2**i, 24 // 2**i) for i, channels in enumerate((3, 4, 5))]
    lateral = [layer(x) for layer, x in zip(pyramid.lateral, maps, strict=True)]
    doubled = [lateral[2], F.interpolate(lateral[2], size=(8, 12), mode="nearest") + lateral[1]]
    doubled.append(F.interpolate(doubled[1], size=(16, 24), mode="nearest") + lateral[0])
    for level, layer, expected in zip(pyramid(maps), pyramid.output, reversed(doubled), strict=True):
        torch.testing.assert_close(level, layer(expected))
        assert level.shape[1] == 8
