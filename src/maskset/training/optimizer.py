"""The optimiser, its groups of parameters, and how the learning rates go with the steps."""

import math

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from maskset.recipe import TrainConfig

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d)
_FUSED = {"cpu", "cuda", "xpu", "mps"}  # devices on which one kernel steps all parameters


def build_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """Return the optimiser of what is trained, in the groups of `parameter_groups`. The model must be on its device already."""
    groups = parameter_groups(model, config)
    fused = {parameter.device.type for group in groups for parameter in group["params"]} <= _FUSED
    if config.optimizer == "sgd":
        return SGD(groups, momentum=config.momentum, weight_decay=config.weight_decay, fused=fused)
    return AdamW(groups, weight_decay=config.weight_decay, fused=fused)


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict]:
    """Return the papers' groups: the backbone, sampling offsets and reference points, and the rest.

    Each has a `name`, and its learning rate at full height as `rate`. AdamW's weight decay is for everything, norms and biases
    too, as in the official code; with SGD, as in detectron2, norms are in groups without.
    """
    scale = learning_rate_scale(config)
    rates = {
        "rest": config.learning_rate * scale,
        "backbone": config.backbone_learning_rate * scale,
        "offsets": config.offset_learning_rate * scale,
    }
    members, undecayed = {name: [] for name in rates}, {name: [] for name in rates}
    spared = _norms(model) if config.optimizer == "sgd" else set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (undecayed if parameter in spared else members)[_group_of(name)].append(parameter)
    groups = [{"params": members[name], "name": name, "rate": rate, "lr": rate} for name, rate in rates.items()]
    groups += [
        {"params": undecayed[name], "name": name, "rate": rate, "lr": rate, "weight_decay": 0.0} for name, rate in rates.items()
    ]
    return [group for group in groups if group["params"]]


def _norms(model: nn.Module) -> set[nn.Parameter]:
    return {parameter for module in model.modules() if isinstance(module, _NORMS) for parameter in module.parameters()}


def _group_of(name: str) -> str:
    if name.startswith("backbone."):
        return "backbone"
    return "offsets" if "sampling_offsets" in name or "reference_points" in name else "rest"


def learning_rate_scale(config: TrainConfig) -> float:
    """Return what the config's learning rates are multiplied by for its batch size."""
    return config.batch_size / config.reference_batch_size if config.scale_learning_rate else 1.0


def rate_factor(step: int, steps_per_epoch: int, config: TrainConfig) -> float:
    """Return what the learning rates are multiplied by in optimiser step `step`, counted from 0.

    Warm-up: (step + 1) / warmup_steps, until 1. Times, with schedule "step", drop_factor for each drop epoch that is over;
    with "cosine", (1 + cos(pi * share)) / 2 where `share` of the steps after the warm-up are done. Where `steps` are set, a
    drop epoch is the same share of them as it is of the epochs.
    """
    total = step_count(steps_per_epoch, config)
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "step":
        return warmup * config.drop_factor ** sum(step * config.epochs >= epoch * total for epoch in config.drop_epochs)
    share = max(0, step - config.warmup_steps) / max(1, total - config.warmup_steps)
    return warmup * (1 + math.cos(math.pi * min(1.0, share))) / 2


def step_count(steps_per_epoch: int, config: TrainConfig) -> int:
    """Return how many optimiser steps the whole run has."""
    return config.steps or config.epochs * steps_per_epoch


def set_learning_rates(optimizer: Optimizer, factor: float) -> dict[str, float]:
    """Set each group's learning rate to `factor` of its full height, and return them by the group's name."""
    for group in optimizer.param_groups:
        group["lr"] = group["rate"] * factor
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


def learning_rate_advice(config: TrainConfig) -> str:
    """Return a line with the learning rates at this batch size, and what linear scaling would make of them."""
    names = {"rest": "learning_rate", "backbone": "backbone_learning_rate", "offsets": "offset_learning_rate"}
    base = {group: getattr(config, name) for group, name in names.items()}
    scale, linear = learning_rate_scale(config), config.batch_size / config.reference_batch_size
    shown = ", ".join(f"{group} {rate * scale:.3g}" for group, rate in base.items())
    line = f"learning rates: {shown} at batch size {config.batch_size}"
    if linear == 1:
        return line + ", the one that they were chosen for"
    if config.scale_learning_rate:
        return line + f", scaled from {config.reference_batch_size}"
    return line + (
        f". They were chosen for {config.reference_batch_size}: linear scaling makes it {base['rest'] * linear:.3g} "
        "(--train.scale-learning-rate true)"
    )
