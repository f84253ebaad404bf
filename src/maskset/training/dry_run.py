"""The cost of a training step, measured on the first steps of a run that writes no files."""

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
from maskset.messages import pluralize
from maskset.recipe import Recipe
from maskset.training.guards import explain_shortages, restore_process_settings
from maskset.training.optimizer import rate_factor, set_learning_rates
from maskset.training.run import Run, open_run
from maskset.training.state import seed_everything
from maskset.training.step import Batch, NotFinite, update
from maskset.training.train import grouped

_WARM_UP = 3  # optimizer steps before measuring, in which memory is allocated
_TIMED = 10  # minimum number of steps whose time is measured
_PROFILED = 2  # steps whose memory is measured


@dataclass(frozen=True)
class Cost:
    """The cost of an optimizer step.

    Attributes:
        seconds: mean time of a step, including reading its images.
        steps_per_epoch: optimizer steps per epoch.
        device: name of the device.
        gigabytes: peak memory of tensors in a step (10^9 bytes): weights, gradients, moments and activations.
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

    Memory is what torch's allocator returned for tensors, on a GPU and on a CPU alike, without Python, torch and reserves of the
    allocator. It is measured on two steps, so larger images or more objects may need more.

    Args:
        recipe: the recipe to measure.
        data: see `maskset.train`, as `images`.
        images: see `maskset.train`.
        seconds: minimum duration of the time measurement.
        progress: whether to show the progress of fitting a mask codec on stderr.

    Raises:
        ValueError: the run cannot be started, see `maskset.train`, or a loss is not finite.
    """
    gc.collect()  # memory of earlier models
    with tempfile.TemporaryDirectory() as folder:
        run, _ = open_run(recipe, data, Path(folder), None, False, images, progress)
    run.state.model.train()
    batches = _steps_without_end(run)
    for _ in range(_WARM_UP):
        _run_step(run, next(batches))
    start, steps = time.perf_counter(), 0
    while steps < _TIMED or time.perf_counter() - start < seconds:
        _run_step(run, next(batches))
        steps += 1
    mean = (time.perf_counter() - start) / steps
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {pluralize(torch.get_num_threads(), 'thread')}"
    return Cost(mean, run.steps, _peak_memory(run, [next(batches) for _ in range(_PROFILED)]) / 1e9, device)


def _steps_without_end(run: Run) -> Iterator[list[Batch]]:
    """Yield the batches of each optimizer step, without end."""
    progress = run.progress
    while True:
        yield from grouped(run.batches(progress.epoch), run.recipe.train.accumulate)
        progress.epoch += 1
        progress.step = progress.epoch * run.steps


def _run_step(run: Run, batches: Sequence[Batch]) -> None:
    """Run one optimizer step as training does."""
    config, progress, optimizer = run.recipe.train, run.progress, run.state.optimizer
    seed_everything(config.seed, progress.step, 0)
    set_learning_rates(optimizer, rate_factor(progress.step, run.steps, config))
    try:
        update(run.accelerator, run.step, optimizer, batches, config.clip_norm)
    except NotFinite as problem:
        raise MasksetError(
            f"training diverged in step {progress.step}: {problem.reason} Try a lower train.learning_rate."
        ) from None
    progress.step += 1


def _peak_memory(run: Run, steps: Sequence[Sequence[Batch]]) -> int:
    """Return the peak memory of tensors during these steps, bytes."""
    device, state = run.accelerator.device, run.state
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        for batches in steps:
            _run_step(run, batches)
        return torch.accelerator.max_memory_allocated(device)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler writes to stderr
    state.optimizer.zero_grad()
    persistent = [*state.model.state_dict().values(), *(state.averaged.state_dict().values() if state.averaged else ())]
    moments = [value for values in state.optimizer.state.values() for value in values.values()]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for batches in steps:
            _run_step(run, batches)
    return sum(tensor.nbytes for tensor in persistent + moments) + _peak_allocation(profiler)


def _peak_allocation(profiler: profile) -> int:
    """Return the peak of the memory that was allocated while the profiler ran, bytes."""
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    current = peak = 0
    for event in sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"]):
        current += event["args"]["Bytes"]
        peak = max(peak, current)
    return peak
