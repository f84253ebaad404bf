"""The optimizer, its parameter groups, and the schedule of their learning rates."""

import math

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from maskset.layers.backbone import BatchNorm
from maskset.recipe import TrainConfig
from maskset.systems import System
from maskset.systems.base import in_parts

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d, BatchNorm)
_FUSED = {"cpu", "cuda", "xpu", "mps"}  # device types on which one kernel updates all parameters


def build_optimizer(model: System, config: TrainConfig) -> Optimizer:
    """Return the optimizer of a model, which must be on its device already. See `parameter_groups`."""
    groups = parameter_groups(model, config)
    fused = {parameter.device.type for group in groups for parameter in group["params"]} <= _FUSED
    if config.optimizer == "sgd":
        return SGD(groups, momentum=config.momentum, weight_decay=config.weight_decay, fused=fused)
    return AdamW(groups, weight_decay=config.weight_decay, fused=fused)


def parameter_groups(model: System, config: TrainConfig) -> list[dict]:
    """Return the papers' parameter groups: the backbone, sampling offsets and reference points, and the rest.

    Each group has a `name`, and as `rate` its learning rate before the schedule. With AdamW, weight decay applies to all
    parameters, including norms and biases, as in the official code; with SGD, norms have none, as in detectron2.
    """
    scale = learning_rate_scale(config)
    rates = {
        "rest": config.learning_rate * scale,
        "backbone": config.backbone_learning_rate * scale,
        "offsets": config.offset_learning_rate * scale,
    }
    decayed, undecayed = {name: [] for name in rates}, {name: [] for name in rates}
    norms = _norms(model) if config.optimizer == "sgd" else set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (undecayed if parameter in norms else decayed)[_group_of(model, name)].append(parameter)
    groups = [{"params": decayed[name], "name": name, "rate": rate, "lr": rate} for name, rate in rates.items()]
    groups += [
        {"params": undecayed[name], "name": name, "rate": rate, "lr": rate, "weight_decay": 0.0} for name, rate in rates.items()
    ]
    return [group for group in groups if group["params"]]


def _norms(model: nn.Module) -> set[nn.Parameter]:
    return {parameter for module in model.modules() if isinstance(module, _NORMS) for parameter in module.parameters()}


def _group_of(model: System, name: str) -> str:
    if in_parts(name, model.BACKBONE_PARTS):
        return "backbone"
    return "offsets" if in_parts(name, model.OFFSET_PARTS) else "rest"


def learning_rate_scale(config: TrainConfig) -> float:
    """Return the factor by which the batch size scales the learning rates."""
    return config.batch_size / config.reference_batch_size if config.scale_learning_rate else 1.0


def rate_factor(step: int, steps_per_epoch: int, config: TrainConfig) -> float:
    """Return the schedule's factor of the learning rates in optimizer step `step`, counted from 0.

    During warm-up it is (step + 1) / warmup_steps. The schedule "step" multiplies it by drop_factor after each drop epoch, the
    schedule "cosine" by (1 + cos(pi * t)) / 2, where t is the completed fraction of the steps after the warm-up. If `steps` is
    set, the drop epochs are scaled to it.
    """
    total = step_count(steps_per_epoch, config)
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "step":
        return warmup * config.drop_factor ** sum(step * config.epochs >= epoch * total for epoch in config.drop_epochs)
    share = max(0, step - config.warmup_steps) / max(1, total - config.warmup_steps)
    return warmup * (1 + math.cos(math.pi * min(1.0, share))) / 2


def step_count(steps_per_epoch: int, config: TrainConfig) -> int:
    """Return the total number of optimizer steps of a run."""
    return config.steps or config.epochs * steps_per_epoch


def set_learning_rates(optimizer: Optimizer, factor: float) -> dict[str, float]:
    """Set each group's learning rate to `factor` times its `rate`, and return the learning rates by group name."""
    for group in optimizer.param_groups:
        group["lr"] = group["rate"] * factor
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


def learning_rate_advice(config: TrainConfig) -> str:
    """Return a line with the learning rates at this batch size, and those that linear scaling would give."""
    names = {"rest": "learning_rate", "backbone": "backbone_learning_rate", "offsets": "offset_learning_rate"}
    base = {group: getattr(config, name) for group, name in names.items()}
    scale, linear = learning_rate_scale(config), config.batch_size / config.reference_batch_size
    rates = ", ".join(f"{group} {rate * scale:.3g}" for group, rate in base.items())
    line = f"learning rates: {rates} at batch size {config.batch_size}"
    if linear == 1:
        return line + ", for which they were tuned"
    if config.scale_learning_rate:
        return line + f", scaled from {config.reference_batch_size}"
    return line + (
        f". They were tuned for {config.reference_batch_size}; linear scaling would give {base['rest'] * linear:.3g} "
        "(--train.scale-learning-rate true)"
    )
