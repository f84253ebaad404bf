"""Losses taken piece by piece."""

import pytest
import torch

from maskset.losses import in_pieces


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
    wanted = torch.autograd.grad((expected * weights).sum(), [shared, *pieces])
    found = in_pieces(values, pieces, shared)
    gradients = torch.autograd.grad((found * weights).sum(), [shared, *pieces])
    torch.testing.assert_close(found, expected)
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_nothing_is_kept_where_no_gradient_is_wanted():
    pieces, shared = inputs()
    with torch.no_grad():
        assert not in_pieces(values, pieces, shared).requires_grad
