"""What a step costs, measured on the first ones."""

import pytest
from runs import data, recipe

from maskset.systems import build
from maskset.training.dry_run import measure_cost


def test_memory_is_that_of_the_tensors_whatever_was_tried_before(capfd):
    averaged, plain, larger = (
        measure_cost(recipe(batch_size=size, ema_decay=decay), data()) for size, decay in ((2, 0.9), (2, 0.0), (4, 0.0))
    )
    weights = sum(parameter.nbytes for parameter in build(recipe().model).parameters()) / 1e9
    assert averaged.gigabytes - plain.gigabytes == pytest.approx(weights, rel=0.1)
    assert 4 * weights < plain.gigabytes < larger.gigabytes < 1  # weights, gradients, two moments, what the network keeps
    assert 0 < plain.seconds < 5
    assert capfd.readouterr().err == ""
