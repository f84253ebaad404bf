"""Training: one loop for all systems. Copy this file if you need another loop."""

import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from maskset.checkpoint import save
from maskset.distributed import launched
from maskset.errors import TrainingDiverged
from maskset.evaluation.evaluate import evaluate
from maskset.evaluation.metrics import Metrics
from maskset.files import lock_folder
from maskset.messages import pluralize
from maskset.recipe import Recipe
from maskset.training.divergence import save_diverged_batch
from maskset.training.guards import explain_shortages, restore_process_settings
from maskset.training.interruption import Interruption
from maskset.training.log import Log
from maskset.training.optimizer import rate_factor, set_learning_rates
from maskset.training.run import Run, open_log, open_run
from maskset.training.sample_images import draw_samples
from maskset.training.state import BEST, seed_everything
from maskset.training.step import NotFinite, Step, average, mean, update

Item = TypeVar("Item")


def train(
    recipe: Recipe | str,
    data: str | Path,
    out: str | Path,
    *,
    init: str | Path | None = None,
    resume: bool = False,
    images: str | Path | None = None,
    progress: bool = True,
) -> Metrics:
    """Train a model and return its last evaluation.

    The folder `out` gets recipe.json, best.safetensors (greatest mask AP) and last.safetensors, which `maskset.load` reads,
    metrics.jsonl, images in samples/, and state.safetensors to resume from. On a CPU, a run that was stopped at any moment and
    resumed ends with exactly the weights of an uninterrupted one.

    Args:
        recipe: a recipe, its name, or a recipe.json.
        data: a data source for `maskset.data.open_data`, with splits "train" and "val".
        out: folder of the run.
        init: checkpoint or run folder to start from; weights that do not fit are not copied.
        resume: continue the run in `out`.
        images: the folder of the images, where `data` is a JSON file; it is then used for training and evaluation.
        progress: whether to print progress.

    Raises:
        ConfigError: a setting is not allowed, `out` contains a run and `resume` is False or the reverse, or another process
            trains in `out`.
        DataError: the data cannot be used.
        CheckpointError: `init` is not a checkpoint, or none of its weights fit.
        TrainingDiverged: the loss or its gradient is not finite.
        ResourceError: there is not enough memory, or a process that reads images was killed.
        OSError: a file cannot be written, for example because the disk is full.
        KeyboardInterrupt: Ctrl-C; after SIGTERM its subclass `Terminated`. The message says how to continue.
    """
    out = Path(out)
    lock = lock_folder(out) if launched("RANK", 0) == 0 else nullcontext()
    with lock, restore_process_settings(), explain_shortages(), Interruption() as interruption:
        with interruption.raise_immediately("stopped before the first step: nothing was written."):
            run, lines = open_run(recipe, data, out, init, resume, images, progress)
        with open_log(run, resume, progress) as log:
            log.print("\n".join(lines))
            metrics = _train(run, log, interruption)
        if metrics is not None:
            return metrics
        with interruption.raise_immediately("stopped: the run is complete, and its evaluation can be repeated with --resume."):
            return evaluate(run.eval_model, run.val_data, max_detections=run.recipe.train.max_detections, progress=progress)


def _train(run: Run, log: Log, interruption: Interruption) -> Metrics | None:
    """Run the remaining steps and return the last evaluation; None if the run was already complete."""
    config, progress, state = run.recipe.train, run.progress, run.state
    metrics = None
    for epoch in range(progress.epoch, run.epochs):
        if config.patience and progress.evaluations_since_best >= config.patience:
            log.print(f"stopped early: {pluralize(progress.evaluations_since_best, 'evaluation')} without a better mask AP")
            break
        state.model.train()
        remaining = run.last_step - progress.step  # the last epoch may be incomplete
        for batches in islice(grouped(run.batches(epoch), config.accumulate), remaining):
            seed_everything(config.seed, progress.step, run.accelerator.process_index)
            rates = set_learning_rates(state.optimizer, rate_factor(progress.step, run.steps, config))
            try:
                terms, norm = update(run.accelerator, run.step, state.optimizer, batches, config.clip_norm)
            except NotFinite as problem:
                names, process = run.image_names(problem.batch_index), run.accelerator.process_index
                raise save_diverged_batch(run.folder, progress.step, rates, problem, names, process) from None
            progress.step += 1
            if state.averaged is not None:
                average(state.averaged, state.model, config.ema_decay, progress.step)
            log.advance(progress.step)
            if progress.step % config.log_every == 0:
                log.log_step(progress.step, epoch, rates, mean(run.accelerator, terms | {"grad_norm": norm}), config.batch_size)
            stop = _any_process(run.accelerator, interruption.requested)
            if stop or (config.checkpoint_every and progress.step % config.checkpoint_every == 0):
                run.save_checkpoint(log)
            if stop:
                raise interruption.error(_stopped(run))
        if epoch + 1 == run.epochs or (config.evaluate_every > 0 and (epoch + 1) % config.evaluate_every == 0):
            run.save_checkpoint(log)
            alone = run.accelerator.num_processes == 1  # several processes must stop at the same place
            with interruption.raise_immediately(_stopped(run)) if alone else nullcontext(), log.paused():
                metrics = _evaluate(run, epoch, log)
        progress.epoch = epoch + 1
        run.save_checkpoint(log)
    return metrics


def grouped(items: Iterable[Item], count: int) -> Iterator[list[Item]]:
    """Yield the items in lists of `count`; the last list may be shorter."""
    group = []
    for item in items:
        group.append(item)
        if len(group) == count:
            yield group
            group = []
    if group:
        yield group


def _evaluate(run: Run, epoch: int, log: Log) -> Metrics:
    """Evaluate, save the weights if they are the best so far, draw sample images, and return the metrics."""
    start, progress = time.perf_counter(), run.progress
    metrics = evaluate(run.eval_model, run.val_data, max_detections=run.recipe.train.max_detections, progress=log.prints)
    better = metrics.mask_ap > (-1 if progress.best is None else progress.best)  # False for NaN: no objects
    if better and run.accelerator.is_main_process:
        save(run.eval_model, run.recipe, run.folder / BEST)
    progress.evaluations_since_best = 0 if better else progress.evaluations_since_best + 1
    progress.best = metrics.mask_ap if better else progress.best
    if run.accelerator.is_main_process:
        draw_samples(run.eval_model, run.val_data, run.folder / "samples" / f"epoch_{epoch + 1:03}.jpg")
    log.log_evaluation(progress.step, epoch, metrics, time.perf_counter() - start, ", the best so far" if better else "")
    return metrics


def _any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Return whether the flag is set in any process, because all must stop after the same step."""
    if accelerator.num_processes == 1:
        return flag
    total = accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum")
    assert isinstance(total, Tensor)
    return total.item() > 0


def _stopped(run: Run) -> str:
    return (
        f"stopped after step {run.progress.step}, epoch {run.progress.epoch + 1}: "
        f"the same command with --resume continues the run in {run.folder}."
    )


__all__ = ["Step", "TrainingDiverged", "train"]
