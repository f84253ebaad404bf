"""Losses taken piece by piece, and losses of masks."""

import pytest
import torch

from maskset.losses import chunked_loss, squared_dice_loss, varifocal_loss


def values(index: int, piece: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    masks = (piece @ shared).sigmoid()
    return torch.stack([masks.square().sum() * (index + 1), masks.sum().exp() * 0.01])


def inputs() -> tuple[list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    pieces = [torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (3, 0, 2)]
    return pieces, torch.randn(4, 7, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("weights", [torch.ones(3, 2), torch.arange(6.0).view(3, 2)], ids=["equal", "unlike"])
def test_values_and_gradients_are_those_of_all_pieces_at_once(weights):
    pieces, shared = inputs()
    expected = torch.stack([values(i, piece, shared) for i, piece in enumerate(pieces)])
    expected_gradients = torch.autograd.grad((expected * weights).sum(), [shared, *pieces])
    actual = chunked_loss(values, pieces, shared)
    gradients = torch.autograd.grad((actual * weights).sum(), [shared, *pieces])
    torch.testing.assert_close(actual, expected)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, other)


def test_nothing_is_kept_where_no_gradient_is_wanted():
    pieces, shared = inputs()
    with torch.no_grad():
        assert not chunked_loss(values, pieces, shared).requires_grad


@pytest.mark.parametrize("least", [1e-5, 0.002])
def test_dice_with_squares_is_that_of_each_pair_alone(least):
    torch.manual_seed(0)
    masks, targets = torch.rand(4, 3, 5), (torch.rand(4, 3, 5) > 0.5).float()
    targets[2] = 0
    losses = squared_dice_loss(masks, targets, least)
    for i in range(4):
        overlap = sum((p * t).item() for p, t in zip(masks[i].flatten(), targets[i].flatten(), strict=True))
        squares = sum((p * p + t * t).item() for p, t in zip(masks[i].flatten(), targets[i].flatten(), strict=True))
        assert losses[i].item() == pytest.approx(1 - 2 * overlap / (squares + least), rel=1e-5)
    assert losses[2] == 1


def test_dice_with_squares_of_a_mask_with_itself_is_nearly_nothing_and_of_nothing_one():
    mask = (torch.rand(1, 9, 9) > 0.5).float()
    assert squared_dice_loss(mask, mask, 0.002).item() < 1e-4
    assert squared_dice_loss(torch.zeros(1, 3, 3), torch.zeros(1, 3, 3), 0.002).item() == 1
    assert squared_dice_loss(torch.zeros(0, 3, 3), torch.zeros(0, 3, 3), 0.002).shape == (0,)


def test_the_varifocal_loss_weighs_all_classes_of_an_object_by_its_quality_and_background_by_its_score():
    logits = torch.tensor([[1.0, -2.0], [0.5, -1.0]], dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([[0.7, 0.0], [0.0, 0.0]], dtype=torch.float64)
    p = logits.sigmoid()
    weights = torch.cat([torch.full((1, 2), 0.7, dtype=torch.float64), 0.75 * p[1:].detach() ** 2])
    expected = -weights * (targets * p.log() + (1 - targets) * (1 - p).log())
    found = varifocal_loss(logits, targets)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients)
