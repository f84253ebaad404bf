"""Which parameter learns how fast, and when."""

import math
from dataclasses import replace

import pytest
import torch
from tiny import TINY, tiny_config
from torch import nn

from maskset.layers.backbone import BatchNorm
from maskset.recipe import TrainConfig
from maskset.systems import build
from maskset.training.optimizer import build_optimizer, learning_rate_advice, parameter_groups, rate_factor, set_learning_rates

OFFICIAL = TrainConfig()


def factors(steps_per_epoch=10, **settings):
    config = replace(OFFICIAL, **settings)
    return [rate_factor(step, steps_per_epoch, config) for step in range(config.epochs * steps_per_epoch)]


def test_the_official_schedule_divides_the_rates_by_ten_after_epoch_40():
    result = factors()
    assert result[:400] == [1.0] * 400
    assert result[400:] == pytest.approx([0.1] * 100)


def test_every_drop_epoch_multiplies_the_rates():
    assert factors(1, epochs=4, drop_epochs=(1, 3), drop_factor=0.5) == [1, 0.5, 0.5, 0.25]


def test_the_schedule_of_the_epochs_is_shrunk_to_the_steps():
    config = TrainConfig(epochs=50, drop_epochs=(40,), steps=10)
    assert [rate_factor(step, 3, config) for step in range(10)] == pytest.approx([1.0] * 8 + [0.1] * 2)
    config = TrainConfig(epochs=2, schedule="cosine", steps=5)
    assert [rate_factor(step, 100, config) for step in range(5)] == pytest.approx(factors(1, epochs=5, schedule="cosine"))


def test_the_warm_up_rises_linearly_to_the_full_rate():
    assert factors(1, epochs=6, warmup_steps=4, drop_epochs=()) == [0.25, 0.5, 0.75, 1, 1, 1]


def test_the_cosine_falls_from_one_to_nearly_zero():
    result = factors(1, epochs=5, schedule="cosine")
    assert result == pytest.approx([(1 + math.cos(math.pi * i / 5)) / 2 for i in range(5)])


def test_the_cosine_starts_when_the_warm_up_ends():
    assert factors(1, epochs=6, schedule="cosine", warmup_steps=2)[:3] == pytest.approx([0.5, 1, 1])


def test_a_longer_warm_up_than_the_training_is_possible():
    assert factors(1, epochs=2, schedule="cosine", warmup_steps=4) == pytest.approx([0.25, 0.5])


def test_the_groups_are_those_of_the_papers():
    model = build(TINY["solq"])
    config = replace(OFFICIAL, learning_rate=3.0, backbone_learning_rate=2.0, offset_learning_rate=1.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = {group["name"]: group for group in parameter_groups(model, config)}
    members = {name: {names[parameter] for parameter in group["params"]} for name, group in groups.items()}
    assert members["backbone"] == {name for name in names.values() if name.startswith("backbone.")}
    assert members["offsets"] == {name for name in names.values() if "sampling_offsets" in name or "reference_points" in name}
    assert len(members["offsets"]) == 2 * (1 + 2 + 1)  # encoder layer, two decoder layers, reference points: weight and bias
    assert sum(len(group) for group in members.values()) == len(names)
    assert {name: group["lr"] for name, group in groups.items()} == {"rest": 3.0, "backbone": 2.0, "offsets": 1.0}


def test_frozen_parameters_are_in_no_group():
    model = build(TINY["solq"])
    model.level_embedding.requires_grad_(False)
    parameters = [parameter for group in parameter_groups(model, OFFICIAL) for parameter in group["params"]]
    assert len(parameters) == len(list(model.parameters())) - 1
    assert not any(parameter is model.level_embedding for parameter in parameters)


def test_weight_decay_is_for_all_parameters():
    optimizer = build_optimizer(build(TINY["solq"]), replace(OFFICIAL, weight_decay=0.5))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.5}


def test_sgd_has_momentum_and_leaves_norms_undecayed():
    model = build(TINY["solq"])
    norms = [module for module in model.modules() if isinstance(module, (nn.LayerNorm, nn.GroupNorm))]
    optimizer = build_optimizer(model, replace(OFFICIAL, optimizer="sgd", momentum=0.5, weight_decay=0.25))
    assert isinstance(optimizer, torch.optim.SGD)
    assert {group["momentum"] for group in optimizer.param_groups} == {0.5}
    decay = {parameter: group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    undecayed = {parameter for norm in norms for parameter in norm.parameters()}
    assert {type(norm) for norm in norms} > {nn.LayerNorm}  # and the backbone's group norms
    assert all(decay[parameter] == (0.0 if parameter in undecayed else 0.25) for parameter in model.parameters())


def test_sgd_leaves_trained_batch_norms_undecayed():
    model = build(tiny_config("solq", backbone={"norm": "batch"}))
    norms = {p for module in model.modules() if isinstance(module, BatchNorm) for p in module.parameters()}
    assert norms
    for group in parameter_groups(model, replace(OFFICIAL, optimizer="sgd", weight_decay=0.25)):
        assert group.get("weight_decay") == 0.0 or not norms & set(group["params"])


def test_setting_the_rates_twice_does_not_add_up():
    rates = {"learning_rate": 1.0, "backbone_learning_rate": 1.0, "offset_learning_rate": 1.0}
    optimizer = build_optimizer(build(TINY["solq"]), replace(OFFICIAL, **rates))
    set_learning_rates(optimizer, 0.5)
    assert set_learning_rates(optimizer, 0.1) == {"rest": 0.1, "backbone": 0.1, "offsets": 0.1}
    assert {group["lr"] for group in optimizer.param_groups} == {0.1}


def test_linear_scaling_multiplies_all_rates_when_asked_for():
    config = replace(OFFICIAL, batch_size=8, scale_learning_rate=True)
    rates = {group["name"]: group["lr"] for group in parameter_groups(build(TINY["solq"]), config)}
    assert rates["rest"] == pytest.approx(OFFICIAL.learning_rate / 4)
    assert rates["backbone"] == pytest.approx(OFFICIAL.backbone_learning_rate / 4)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "rest 0.0002, backbone 2e-05, offsets 2e-05 at batch size 32, for which they were tuned"),
        ({"batch_size": 16}, "They were tuned for 32; linear scaling would give 0.0001 (--train.scale-learning-rate true)"),
        (
            {"batch_size": 16, "scale_learning_rate": True},
            "rest 0.0001, backbone 1e-05, offsets 1e-05 at batch size 16, scaled from 32",
        ),
    ],
)
def test_the_rates_for_this_batch_size_are_told(settings, expected):
    assert expected in learning_rate_advice(replace(OFFICIAL, **settings))
