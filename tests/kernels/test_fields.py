"""Pasting and painting in C against the plain versions, pixel for pixel, and against float64."""

import pytest
import torch
import torch.nn.functional as F

from maskset.masks.paint import paint, paint_probabilities, paste, paste_soft
from maskset.masks.resize import align_corners, aligned_bilinear, half_pixel, resample


def smooth(count: int, size: tuple[int, int], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.interpolate(torch.randn(1, count, 4, 4, generator=generator), size, mode="bicubic")[0] * 3 - 1


def boxes_around(count: int, size: tuple[int, int], seed: int) -> torch.Tensor:
    """Return boxes in and around an image: any, whole and quarter coordinates, and some that are no boxes."""
    generator = torch.Generator().manual_seed(seed)
    sides = torch.tensor([size[1], size[0]])
    corners = torch.rand(count, 2, generator=generator) * sides * 1.3 - 8
    boxes = torch.cat([corners, corners + torch.rand(count, 2, generator=generator) * sides], 1)
    boxes = [boxes, boxes.round(), (4 * boxes).round() / 4][seed % 3]
    inf, nan = torch.inf, torch.nan
    strange = [[5, 5, 5, 9], [9, 9, 3, 3], [nan, 0, 5, 5], [-inf, 0, 5, 5], [0, 0, inf, 5], [-1e9, -1e9, 1e9, 1e9]]
    return torch.cat([boxes, torch.tensor(strange)])


@pytest.mark.parametrize("side", [1, 2, 14, 28, 128])
@pytest.mark.parametrize("seed", range(6))
def test_what_is_pasted_is_what_the_plain_version_pastes(both, side, seed):
    size = [(60, 80), (1, 90), (75, 1)][seed % 3]
    boxes = boxes_around(20, size, seed)
    fields = smooth(len(boxes), (side, side), seed).sigmoid()
    found, expected = both(lambda: paste_soft(fields, boxes, size, 0.45))
    assert found == expected
    found, expected = both(lambda: paste(fields > 0.5, boxes, size))
    assert found == expected


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_field_with_a_value_that_is_not_finite_pastes_nothing_on_both_paths(both, value):
    fields = torch.ones(2, 5, 5)
    fields[0, 2, 2] = value
    for masks in both(lambda: paste_soft(fields, torch.tensor([[2.0, 2, 12, 12]]).repeat(2, 1), (20, 20), 0.5)):
        assert masks.areas().tolist() == [0, 100]


def test_pasting_differs_from_float64_only_where_a_sample_is_the_threshold():
    boxes = boxes_around(40, (60, 80), 0)[:40]
    boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 4)  # in narrower ones places themselves are rounded more
    fields = smooth(40, (28, 28), 1).sigmoid()
    found = paste_soft(fields, boxes, (60, 80), 0.5).dense()
    weights = []
    for axis, pixels in ((1, 60), (0, 80)):
        low, high = boxes[:, axis, None].double(), boxes[:, axis + 2, None].double()
        places = (torch.arange(pixels) + 0.5 - low) / (high - low) * 28 - 0.5
        weights.append((1 - (places[:, :, None] - torch.arange(28)).abs()).clamp(min=0))
    samples = weights[0] @ fields.double() @ weights[1].mT
    assert ((samples >= 0.5) == found)[(samples - 0.5).abs() > 1e-4].all()
    assert found.float().mean() > 0.02


STEPS = {
    "one resize": lambda mid, size: [(half_pixel(9, size[0]), half_pixel(11, size[1]))],
    "SOIT": lambda mid, size: [
        (aligned_bilinear(9, 4), aligned_bilinear(11, 4)),
        torch.sigmoid,
        (align_corners(36, mid[0]), align_corners(44, mid[1])),
        (align_corners(mid[0], size[0]), align_corners(mid[1], size[1])),
    ],
}


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("size", [(50, 70), (7, 6), (1, 1), (200, 3)])
def test_what_is_painted_is_what_the_plain_version_paints(both, steps, size):
    maps = smooth(30, (9, 11), 3)
    maps[3], maps[4], maps[5] = -1, 1, -1
    maps[5, -1, -1] = 9
    chain = STEPS[steps]((31, 45), size)
    found, expected = both(lambda: paint(maps, chain, 0.0, 0.5 if len(chain) > 1 else 0.0))
    assert found == expected
    whole = maps.double()
    for step in chain:
        whole = resample(whole, *step) if isinstance(step, tuple) else step(whole)
    threshold = 0.5 if len(chain) > 1 else 0.0
    assert ((whole > threshold) == found.dense())[(whole - threshold).abs() > 1e-5].all()


def test_few_maps_at_a_time_are_all_maps(monkeypatch):
    maps = smooth(30, (9, 11), 3).sigmoid()
    expected = paint_probabilities(maps, 4, (33, 44), (50, 60))
    monkeypatch.setattr("maskset.masks.paint._MAX_CELLS", 2000)
    assert paint_probabilities(maps, 4, (33, 44), (50, 60)) == expected


def test_part_of_a_canvas_is_painted_as_the_plain_version_paints_it(both):
    maps = smooth(12, (8, 10), 5).sigmoid()
    for shown in [(32, 40), (29, 37), (1, 1), (17, 40)]:
        found, expected = both(lambda shown=shown: paint_probabilities(maps, 4, shown, (41, 23)))
        assert found == expected
