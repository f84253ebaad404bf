"""Averaged weights."""

import pytest
import torch
from torch import nn

from maskset.training.step import average, averaged_copy


def scalar(value: float) -> nn.Linear:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


def test_the_average_is_the_papers_formula_once_it_has_warmed_up():
    averaged = averaged_copy(scalar(1.0))
    average(averaged, scalar(3.0), decay=0.75, step=1000)
    assert averaged.weight.item() == pytest.approx(0.75 * 1 + 0.25 * 3)


def test_at_first_the_average_follows_closely():
    averaged = averaged_copy(scalar(1.0))
    average(averaged, scalar(3.0), decay=0.999, step=1)
    assert averaged.weight.item() == pytest.approx(2 / 11 * 1 + 9 / 11 * 3)


def test_averaging_leaves_the_model_alone_and_asks_for_no_gradient():
    model = scalar(2.0)
    averaged = averaged_copy(model)
    average(averaged, scalar(4.0), 0.5, 100)
    assert model.weight.item() == 2.0
    assert model.weight.requires_grad
    assert not averaged.weight.requires_grad
    assert not averaged.training
    assert not torch.equal(averaged.weight, model.weight)


def test_statistics_of_batch_norms_are_those_of_the_model():
    model = torch.nn.BatchNorm2d(3)
    averaged = averaged_copy(model)
    model(torch.randn(4, 3, 5, 5) + 7)
    average(averaged, model, 0.9, 1)
    assert torch.equal(averaged.running_mean, model.running_mean)
    assert averaged.running_mean.abs().min() > 0.1
