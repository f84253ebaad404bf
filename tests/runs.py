"""Tiny training runs, for tests."""

import functools
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tiny import SMALLEST, TINY
from tiny import shapes as images

from maskset.data import shapes
from maskset.recipe import DataConfig, Recipe, TrainConfig
from maskset.structures import ImageBatch
from maskset.systems import build
from maskset.training.step import Step, mean, update

SMALLER = {"solq": {"mask_size": 16, "code_length": 16}}
TIMES = ("seconds", "images_per_second")


@functools.cache
def data() -> Path:
    """Return a folder of 10 images to learn from (5 steps of an epoch) and 2 to evaluate on."""
    folder = Path(tempfile.mkdtemp(prefix="maskset-test-")) / "shapes"
    return shapes.write(folder, {"train": 10, "val": 2}, size=(48, 64))


def recipe(system: str = "solq", dropout: float = 0.1, **settings: Any) -> Recipe:
    """Return a run of 2 epochs of 5 steps; dropout and EMA are on, so that all there is to go wrong in resuming is there."""
    train = TrainConfig(
        epochs=2, batch_size=2, reference_batch_size=2, learning_rate=1e-3, log_every=1, ema_decay=0.9, warmup_steps=3
    )
    drops = {"dropout": dropout} if hasattr(TINY[system], "dropout") else {}
    return Recipe(
        model=replace(TINY[system], backbone=SMALLEST, **drops, **SMALLER.get(system, {})),
        data=DataConfig(augmentation="flip", short_sides=(48, 56), long_side=96, workers=0),
        train=replace(train, **settings),
    )


def lines(run: Path) -> list[dict[str, Any]]:
    """Return what metrics.jsonl says, apart from times."""
    parsed = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in parsed]


def assert_same_run(run: Path, expected: Path) -> None:
    """Assert that two runs are equal, bit for bit: weights, averaged weights, moments, checkpoints, and all that was measured."""
    for name in ("state.safetensors", "last.safetensors", "best.safetensors"):
        tensors, expected_tensors = load_file(run / name), load_file(expected / name)
        assert tensors.keys() == expected_tensors.keys()
        assert not [key for key in tensors if not torch.equal(tensors[key], expected_tensors[key])], name
    assert lines(run) == lines(expected)


def gradient_of_share(accelerator: Accelerator, system: str, empty: Sequence[int]) -> dict[str, torch.Tensor]:
    """Return loss, terms and gradient of one step on a batch of four images, of which each process has its share.

    Args:
        accelerator: knows the processes.
        system: which tiny model to build, the same in all processes.
        empty: images whose objects are left out.
    """
    torch.manual_seed(0)
    quiet = {"target_noise": False} if hasattr(TINY[system], "target_noise") else {}  # else each process draws its own
    model = build(replace(TINY[system], backbone=SMALLEST, **quiet)).train()
    model.prepare(targets for _, targets in images(8))
    with torch.no_grad():
        for parameter in model.parameters():  # off the start, where many gradients are zero
            parameter += 0.02 * torch.randn_like(parameter)
    examples = [(pixels, targets[[]] if i in empty else targets) for i, (pixels, targets) in enumerate(images(4))]
    share = 4 // accelerator.num_processes
    mine = examples[accelerator.process_index * share :][:share]
    batch = ImageBatch.from_images([pixels for pixels, _ in mine], model.input.divisor), [objects for _, objects in mine]
    step = accelerator.prepare(Step(model))
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.0))
    terms, norm = update(accelerator, step, optimizer, [batch], clip_norm=0)
    means = {name: torch.tensor(value) for name, value in mean(accelerator, {**terms, "grad_norm": norm}).items()}
    return means | {f"gradient/{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
