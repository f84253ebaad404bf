"""The state from which a run is resumed: one file, replaced atomically, so that a killed process cannot damage it.

It contains weights, averaged weights and the optimizer's moments as tensors, and the progress of the run as JSON. It contains no
random states, because the generators are seeded with (seed, step, process) before every step, see `seed_everything`.
"""

import json
import random
from collections.abc import Container
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from maskset import config
from maskset.checkpoint import open_safetensors, write_tensors
from maskset.errors import CheckpointError, ConfigError
from maskset.recipe import Recipe
from maskset.systems import System

RECIPE, METRICS, STATE = "recipe.json", "metrics.jsonl", "state.safetensors"  # files of a run folder ...
LAST, BEST = "last.safetensors", "best.safetensors"  # ... and its checkpoints

# Settings that a resumed run may change, because the completed steps do not depend on them. With schedule "cosine", another
# number of epochs changes the remaining learning rates. A run that a broken image has stopped can continue without it.
MAY_CHANGE = {
    "data.workers",
    "data.skip_broken",
    "train.epochs",
    "train.evaluate_every",
    "train.checkpoint_every",
    "train.log_every",
    "train.patience",
    "train.max_detections",
    "train.trackers",
}


@dataclass
class Progress:
    """The progress of a run.

    Attributes:
        epoch: current epoch, from 0.
        step: optimizer steps done.
        best: greatest mask AP so far; None before the first evaluation that has one.
        evaluations_since_best: evaluations since then.
        log_bytes: length of metrics.jsonl.
    """

    epoch: int = 0
    step: int = 0
    best: float | None = None
    evaluations_since_best: int = 0
    log_bytes: int = 0


@dataclass(frozen=True)
class TrainingState:
    """The objects that training changes.

    Attributes:
        model: the model.
        optimizer: its optimizer.
        averaged: the model with averaged weights, if the run has them.
        scaler: the gradient scaler of fp16, if the run has one; its `state_dict` is plain numbers.
    """

    model: System
    optimizer: Optimizer
    averaged: System | None = None
    scaler: Any = None


def seed_everything(seed: int, step: int, process: int) -> None:
    """Seed all random generators for one step of one process.

    Random numbers depend on nothing else, so a resumed run draws the same ones as an uninterrupted run.
    """
    mixed = int(np.random.SeedSequence([seed, step, process]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)  # of all devices


def save_state(folder: Path, state: TrainingState, progress: Progress, data: dict[str, Any]) -> None:
    """Write the state of a run.

    Args:
        folder: the run folder.
        state: the objects to save.
        progress: progress of the run.
        data: description of the training data; `load_state` compares it.
    """
    tensors = {f"model/{name}": tensor for name, tensor in state.model.state_dict().items()}
    if state.averaged is not None:
        tensors |= {f"averaged/{name}": tensor for name, tensor in state.averaged.state_dict().items()}
    for name, parameter in state.model.named_parameters():
        moments = state.optimizer.state.get(parameter, {})
        tensors |= {f"optimizer/{name}/{key}": torch.as_tensor(value) for key, value in moments.items()}
    facts = {
        "progress": asdict(progress),
        "data": data,
        "scaler": state.scaler.state_dict() if state.scaler is not None else {},
    }
    write_tensors(tensors, folder / STATE, {key: json.dumps(value) for key, value in facts.items()})


def load_state(folder: Path, state: TrainingState, data: dict[str, Any]) -> Progress:
    """Restore the state of a run and return its progress.

    Raises:
        ConfigError: the run was started with other training data.
        CheckpointError: the file is damaged or does not fit.
    """
    with open_safetensors(folder / STATE) as file:
        facts = {key: json.loads(text) for key, text in file.metadata().items()}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if facts["data"] != data:
        changed = [
            f"{key}: {facts['data'].get(key)} then, {value} now" for key, value in data.items() if facts["data"].get(key) != value
        ]
        raise ConfigError(f"the training data is not what the run in {folder} was started with: {'; '.join(changed)}.")
    try:
        state.model.load_state_dict(_under(tensors, "model/"))
        if state.averaged is not None:
            state.averaged.load_state_dict(_under(tensors, "averaged/"))
    except RuntimeError as error:
        raise CheckpointError(f"{folder / STATE} does not fit the model: {' '.join(str(error).split())[:300]}") from None
    for name, parameter in state.model.named_parameters():
        moments = _under(tensors, f"optimizer/{name}/")
        if moments:
            state.optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in moments.items()}
    if state.scaler is not None and facts["scaler"]:
        state.scaler.load_state_dict(facts["scaler"])
    return Progress(**facts["progress"])


def check_folder(folder: Path, resume: bool) -> None:
    """Check that a run can be started, or resumed, in a folder.

    Raises:
        ConfigError: it holds a run and `resume` is False, or it holds none and `resume` is True.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; a run needs a folder.")
    has_run = (folder / RECIPE).is_file()
    if has_run and not resume:
        raise ConfigError(f"{folder} already contains a run: continue it with --resume, or choose another folder with --out.")
    if resume and not has_run:
        raise ConfigError(f"{folder} does not contain a run to resume: leave --resume out to start one.")


def check_recipe(folder: Path, recipe: Recipe) -> None:
    """Check that a run can be resumed with a recipe.

    Raises:
        ConfigError: a setting differs that a resumed run may not change.
    """
    steps = recipe.train.steps
    # With train.steps, epochs only set when the learning rate drops.
    allowed = MAY_CHANGE - {"train.epochs"} if steps else MAY_CHANGE
    if changed := differences(config.read(Recipe, folder / RECIPE), recipe, allowed):
        longer = "A run with train.steps cannot be made longer: start a new one with --init. " if steps else ""
        raise ConfigError(
            f"the run in {folder} was started with other settings: {'; '.join(changed)}. {longer}"
            f"Of a resumed run only these may change: {', '.join(sorted(allowed))}."
        )


def differences(old: Any, new: Any, allowed: Container[str] = ()) -> list[str]:
    """Return one text for each setting that differs between two objects of a settings class, except the `allowed` ones."""
    before, after = flat(config.to_dict(old)), flat(config.to_dict(new))
    names = [name for name in {**before, **after} if before.get(name) != after.get(name) and name not in allowed]
    return [f"{name} was {before.get(name)}, is {after.get(name)}" for name in names]


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dicts as a single one with names such as "model.input.mean"."""
    flattened: dict[str, Any] = {}
    for name, value in values.items():
        flattened |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flattened


def _under(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
