"""The cost of a training step, measured on the first steps of a run that is thrown away."""

import gc
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from maskset.errors import MasksetError
from maskset.recipe import Recipe
from maskset.training.guards import explain_shortages, restore_process_settings
from maskset.training.log import counted
from maskset.training.optimizer import rate_factor, set_learning_rates
from maskset.training.run import Run, open_run
from maskset.training.state import seed_everything
from maskset.training.step import Batch, NotFinite, update
from maskset.training.train import grouped

_WARM_UP, _TIMED, _WEIGHED = 3, 10, 2  # optimizer steps: until all memory is there; timed at least; whose memory is measured


@dataclass(frozen=True)
class Cost:
    """The cost of an optimizer step.

    Attributes:
        seconds: mean time of a step with the reading of its images.
        steps_per_epoch: optimizer steps per epoch.
        device: name of the device.
        gigabytes: greatest memory that tensors take in a step (10^9 bytes): weights, gradients, the optimizer's moments and what
            the network keeps to compute gradients.
    """

    seconds: float
    steps_per_epoch: int
    gigabytes: float
    device: str


@restore_process_settings()
@explain_shortages()
def measure_cost(
    recipe: Recipe, data: str | Path, *, images: str | Path | None = None, seconds: float = 0.0, progress: bool = True
) -> Cost:
    """Return the cost of a training step of a recipe on this data and machine.

    Memory is what torch's allocator gave out for tensors, on a GPU and on a CPU alike: neither Python and torch themselves, nor
    what an allocator keeps in reserve. It is measured on two steps, so larger images or more objects may yet need more.

    Args:
        recipe: the recipe to measure.
        data: see `maskset.train`, as `images`.
        images: see `maskset.train`.
        seconds: minimum duration of the time measurement.
        progress: whether to show the progress of fitting a mask code on stderr.

    Raises:
        ValueError: the run cannot be started, see `maskset.train`, or a loss is not finite.
    """
    gc.collect()  # what an earlier model has left
    with tempfile.TemporaryDirectory() as folder:
        run, _ = open_run(recipe, data, Path(folder), None, False, images, progress)
    run.trained.model.train()
    batches = _endless(run)
    for _ in range(_WARM_UP):
        _run_step(run, next(batches))
    start, steps = time.perf_counter(), 0
    while steps < _TIMED or time.perf_counter() - start < seconds:
        _run_step(run, next(batches))
        steps += 1
    mean = (time.perf_counter() - start) / steps
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {counted(torch.get_num_threads(), 'thread')}"
    return Cost(mean, run.steps, _peak(run, [next(batches) for _ in range(_WEIGHED)]) / 1e9, device)


def _endless(run: Run) -> Iterator[list[Batch]]:
    """Yield the batches of one optimizer step after the other, epoch after epoch."""
    progress = run.progress
    while True:
        yield from grouped(run.batches(progress.epoch), run.recipe.train.accumulate)
        progress.epoch += 1
        progress.step = progress.epoch * run.steps


def _run_step(run: Run, batches: Sequence[Batch]) -> None:
    """Run one optimizer step as training does."""
    config, progress, trained = run.recipe.train, run.progress, run.trained
    seed_everything(config.seed, progress.step, 0)
    set_learning_rates(trained.optimizer, rate_factor(progress.step, run.steps, config))
    try:
        update(run.accelerator, run.step, trained.optimizer, batches, config.clip_norm)
    except NotFinite as problem:
        raise MasksetError(f"training diverged in step {progress.step}: {problem.why} Try a lower train.learning_rate.") from None
    progress.step += 1


def _peak(run: Run, steps: Sequence[Sequence[Batch]]) -> int:
    """Return how many bytes tensors take at the most while these steps are done."""
    device, trained = run.accelerator.device, run.trained
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        for batches in steps:
            _run_step(run, batches)
        return torch.accelerator.max_memory_allocated(device)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler tells on stderr that it starts and stops
    trained.optimizer.zero_grad()
    lasting = [*trained.model.state_dict().values(), *(trained.averaged.state_dict().values() if trained.averaged else ())]
    moments = [value for state in trained.optimizer.state.values() for value in state.values()]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for batches in steps:
            _run_step(run, batches)
    return sum(tensor.nbytes for tensor in lasting + moments) + _most_allocated(profiler)


def _most_allocated(profiler: profile) -> int:
    """Return the greatest sum of what was allocated and not yet freed while the profiler looked, bytes."""
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    now = most = 0
    for event in sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"]):
        now += event["args"]["Bytes"]
        most = max(most, now)
    return most
