import pytest
import torch

from maskset.layers import roi
from maskset.layers.roi import levels_of, pyramid_roi_align


def pyramid(batch: int = 2, channels: int = 3) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(batch, channels, 128 // s, 160 // s) for s in (4, 8, 16, 32)]


def planes() -> list[torch.Tensor]:
    """Return levels whose two channels are x and y in pixels, which bilinear samples give back as they are."""
    levels = []
    for s in (4, 8, 16, 32):
        y, x = torch.meshgrid(torch.arange(1024 // s) * s + s / 2, torch.arange(1024 // s) * s + s / 2, indexing="ij")
        levels.append(torch.stack([x, y])[None])
    return levels


@pytest.mark.parametrize(
    ("side", "level"), [(1, 0), (111.9, 0), (112.1, 1), (223.9, 1), (224.1, 2), (447, 2), (449, 3), (5000, 3)]
)
def test_larger_boxes_are_read_from_coarser_levels(side, level):
    assert levels_of(torch.tensor([[0.0, 0, side, side], [-side, 5, 0, side + 5]])).tolist() == [level, level]


def test_the_area_counts_not_the_longer_side():
    assert levels_of(torch.tensor([[0.0, 0, 1000, 10]])).tolist() == [0]


@pytest.mark.parametrize("box", [(100.0, 200.0, 170.0, 250.0), (100.0, 100.0, 800.0, 600.0)])
def test_a_cell_holds_what_is_at_its_place_whatever_the_level(box):
    found = pyramid_roi_align(planes(), torch.tensor([[box]]), 7)
    x0, y0, x1, y1 = box
    x = x0 + (torch.arange(7) + 0.5) / 7 * (x1 - x0)
    y = y0 + (torch.arange(7) + 0.5) / 7 * (y1 - y0)
    torch.testing.assert_close(found[0, 0], x.expand(7, 7), atol=1e-3, rtol=0)
    torch.testing.assert_close(found[0, 1], y[:, None].expand(7, 7), atol=1e-3, rtol=0)


def test_boxes_are_read_from_their_own_image():
    levels, boxes = pyramid(), torch.rand(2, 5, 4).cumsum(-1) * 60
    together = pyramid_roi_align(levels, boxes, 4).unflatten(0, (2, 5))
    for i in range(2):
        torch.testing.assert_close(together[i], pyramid_roi_align([level[i : i + 1] for level in levels], boxes[i : i + 1], 4))


def test_what_is_traced_gives_the_same_as_what_runs(monkeypatch):
    boxes = torch.rand(2, 40, 4).cumsum(-1) * torch.tensor([10.0, 200.0]).repeat(20)[:, None]
    levels = [level.requires_grad_() for level in pyramid()]
    expected = pyramid_roi_align(levels, boxes, 4)
    expected.square().sum().backward()
    gradients = [level.grad.clone() for level in levels]
    assert len(set(levels_of(boxes.flatten(0, 1)).tolist())) > 2
    monkeypatch.setattr(roi.torch.compiler, "is_compiling", lambda: True)
    for level in levels:
        level.grad = None
    found = pyramid_roi_align(levels, boxes, 4)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    for level, gradient in zip(levels, gradients, strict=True):
        torch.testing.assert_close(level.grad, gradient)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_box_that_is_not_finite_reads_nothing_that_is_not(value):
    found = pyramid_roi_align(pyramid(1), torch.tensor([[[value] * 4, [5, 5, value, 9], [1e30, 0, 1e30, 5]]]), 7)
    assert found.isfinite().all()


def test_a_box_outside_of_the_image_reads_zero():
    assert not pyramid_roi_align(pyramid(1), torch.tensor([[[-90.0, -90, -50, -50], [400, 10, 450, 50]]]), 7).any()


def test_no_box_at_all_gives_no_features():
    assert pyramid_roi_align(pyramid(), torch.zeros(2, 0, 4), 7).shape == (0, 3, 7, 7)
