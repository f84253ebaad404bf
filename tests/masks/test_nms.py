"""Duplicates among masks, against loops written from the equations of SOLOv2 (section 3.3)."""

import math

import pytest
import torch

from maskset.masks.nms import greedy_nms, mask_iou, matrix_nms


def random_masks(count: int, seed: int = 0) -> torch.Tensor:
    """Return rectangles that overlap much."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(0, 6, (count, 4), generator=generator).tolist()
    masks = torch.zeros(count, 14, 15, dtype=torch.bool)
    for mask, (y, x, h, w) in zip(masks, corners, strict=True):
        mask[y : y + h + 2, x : x + w + 2] = True
    return masks


def slow_iou(a: torch.Tensor, b: torch.Tensor) -> float:
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 0.0


def slow_decay(masks: torch.Tensor, labels: list[int], kernel: str, sigma: float) -> list[float]:
    """Return the decay of eq. 5: the least over better masks i of f(iou_ij) / f(iou of i with the mask that hurts it most)."""

    def iou(i: int, j: int) -> float:
        return slow_iou(masks[i], masks[j]) if labels[i] == labels[j] else 0.0

    def f(overlap: float) -> float:
        return math.exp(-sigma * overlap**2) if kernel == "gaussian" else 1 - overlap

    decays = []
    for j in range(len(masks)):
        decay = 1.0
        for i in range(j):
            hurt = min([f(iou(k, i)) for k in range(i)], default=1.0)
            if hurt > 0:  # i is a copy of a better one, which is in the list as well
                decay = min(decay, f(iou(i, j)) / hurt)
        decays.append(decay)
    return decays


@pytest.mark.parametrize("kernel", ["gaussian", "linear"])
@pytest.mark.parametrize("sigma", [2.0, 0.5])
@pytest.mark.parametrize("count", [0, 1, 2, 30])
def test_matrix_nms_is_the_equation(kernel, sigma, count):
    masks = random_masks(count)
    labels = torch.arange(count) % 3
    result = matrix_nms(mask_iou(masks), labels, kernel, sigma)
    torch.testing.assert_close(result, torch.tensor(slow_decay(masks, labels.tolist(), kernel, sigma)), atol=1e-5, rtol=1e-5)
    assert ((result >= 0) & (result <= 1)).all()


@pytest.mark.parametrize("kernel", ["gaussian", "linear"])
def test_copies_of_a_mask_have_a_finite_decay(kernel):
    masks = torch.cat([random_masks(2, seed=3)[[0, 0, 0]], random_masks(2, seed=3)[[1, 1]]])
    labels = torch.zeros(5, dtype=torch.int64)
    result = matrix_nms(mask_iou(masks), labels, kernel)
    torch.testing.assert_close(result, torch.tensor(slow_decay(masks, [0] * 5, kernel, 2.0)))
    assert result[0] == 1
    assert result[1].item() == pytest.approx(math.exp(-2) if kernel == "gaussian" else 0)


def test_masks_of_other_classes_and_empty_ones_do_no_harm():
    masks = random_masks(4)[[0, 0, 0, 0]]
    masks[2:] = False
    for kernel in ("gaussian", "linear"):
        assert matrix_nms(mask_iou(masks), torch.tensor([0, 1, 2, 2]), kernel).tolist() == [1, 1, 1, 1]
    assert greedy_nms(mask_iou(masks), torch.tensor([0, 1, 2, 2])).all()


@pytest.mark.parametrize("count", [0, 1, 7])
def test_the_iou_is_that_of_sets(count):
    masks = random_masks(count)
    wanted = [[slow_iou(a, b) for b in masks] for a in masks]
    torch.testing.assert_close(mask_iou(masks), torch.tensor(wanted).view(count, count))


def test_the_iou_does_not_depend_on_how_many_cells_are_counted_at_a_time(monkeypatch):
    masks = random_masks(9)
    expected = mask_iou(masks)
    monkeypatch.setattr("maskset.masks.nms._MAX_CELLS", 100)
    assert torch.equal(mask_iou(masks), expected)


@pytest.mark.parametrize("threshold", [0.2, 0.5])
@pytest.mark.parametrize("seed", range(4))
def test_greedy_suppression_is_that_of_a_plain_loop(threshold, seed):
    masks, labels = random_masks(25, seed), torch.arange(25) % 2
    kept: list[int] = []
    for j in range(25):
        if not any(labels[i] == labels[j] and slow_iou(masks[i], masks[j]) > threshold for i in kept):
            kept.append(j)
    assert greedy_nms(mask_iou(masks), labels, threshold).nonzero()[:, 0].tolist() == kept
    assert 2 < len(kept) < 25


def test_greedy_nms_of_no_masks_keeps_none():
    assert greedy_nms(torch.zeros(0, 0), torch.zeros(0, dtype=torch.int64)).tolist() == []
