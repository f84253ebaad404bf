"""Comparison of recipes and models on the same data: same training budget, same evaluation, one table and one figure."""

import gc
import hashlib
import json
import math
import os
import statistics
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from maskset import config, recipes
from maskset.checkpoint import find, is_model, read_metadata
from maskset.comparison.figure import draw_figure
from maskset.comparison.results import (
    FIGURE,
    JSON,
    MEASURED,
    TABLE,
    Comparison,
    ComparisonEntry,
    ComparisonSettings,
    format_number,
)
from maskset.data import Dataset, ShapesDataset, open_data
from maskset.distributed import launched
from maskset.errors import ConfigError, DataError, MasksetError
from maskset.evaluation.evaluate import class_labels, evaluate
from maskset.files import LOCK_FILE, atomic_write, lock_folder
from maskset.inference.predict import load_model
from maskset.recipe import Recipe
from maskset.training import state
from maskset.training.dry_run import measure_cost
from maskset.training.log import Output
from maskset.training.optimizer import step_count
from maskset.training.train import train

_TRIAL = 0.05  # part of the minutes that is spent on measuring the speed
_LOG_EVERY = 10  # maximum number of optimizer steps between lines of a run's log, which has the seconds per step


def compare(
    models: Sequence[str | Path],
    data: str | Path,
    out: str | Path,
    *,
    epochs: int | None = None,
    minutes: float | None = None,
    images: str | Path | None = None,
    split: str = "val",
    max_detections: int = 100,
    skip_broken: bool = False,
    progress: bool = True,
) -> Comparison:
    """Train recipes, evaluate them and trained models on the same data, and return the results; `print` shows the table.

    Each recipe is trained in its own run folder inside `out`; trained models are only evaluated. `out` gets comparison.json,
    comparison.md with the table, and comparison.png with a few images side by side. The same call resumes an
    interrupted comparison without repeating finished models; models can be added. If a model fails, the others continue.

    With `epochs` or `minutes` the schedule of a recipe is scaled to the budget. Minutes are converted to a number of optimizer
    steps by measuring the speed of a few steps first, so that a run is reproducible. The table has the minutes that training
    took; measuring the speed and evaluating take additional time.

    Args:
        models: recipe names, recipe.json files, checkpoints or run folders.
        data: a data source for `maskset.data.open_data`; recipes are trained on its split "train".
        out: folder of the comparison.
        epochs: number of epochs to train each recipe.
        minutes: minutes to train each recipe. Without both, each has its own number of epochs.
        images: the folder of the images, where `data` is a JSON file.
        split: the split that models are evaluated on.
        max_detections: maximum number of detections per image, best first.
        skip_broken: leave out broken images and annotations, in training too.
        progress: whether to print progress.

    Raises:
        ConfigError: a recipe is unknown, two models have the same name, the budget is invalid, `out` holds another
            comparison, or another process writes into it.
        CheckpointError: a model is not a checkpoint.
        DataError: the data cannot be used, or has no class in common with a trained model.
        KeyboardInterrupt: Ctrl-C; the same call resumes the comparison.
    """
    _check_arguments(epochs, minutes, max_detections)
    out, dataset = Path(out), open_data(data, split, images, skip_broken)
    planned = _plan_entries([models] if isinstance(models, (str, Path)) else models, dataset, skip_broken)
    settings = ComparisonSettings(
        data="shapes:" if isinstance(dataset, ShapesDataset) else str(Path(data).absolute()),
        images=None if images is None else str(Path(images).absolute()),
        split=split,
        epochs=epochs,
        minutes=minutes,
        max_detections=max_detections,
        skip_broken=skip_broken,
        image_count=len(dataset),
        classes=tuple(category.name for category in dataset.categories),
    )
    with lock_folder(out):
        earlier = _load_earlier(out, settings)
        entries = {name: _resume_entry(earlier.get(name), entry, out, settings) for name, entry in planned.items()}
        try:
            Comparison(settings=settings, models=tuple((earlier | entries).values())).save(out / JSON)
            for name in entries:
                for entry in _run_entry(entries[name], settings, dataset, out, progress):
                    entries[name] = entry
                    Comparison(settings=settings, models=tuple((earlier | entries).values())).save(out / JSON)
            done = {name: entry for name, entry in earlier.items() if entry.state == "done"}
            comparison = Comparison(settings=settings, models=tuple((done | entries).values()))
            _write_table_and_figure(comparison, dataset, out)
        except KeyboardInterrupt as interrupt:
            raise type(interrupt)(f"the same command continues the comparison in {out}.") from None
    return comparison


def _check_arguments(epochs: int | None, minutes: float | None, max_detections: int) -> None:
    if epochs is not None and minutes is not None:
        raise ConfigError(f"the budget is either epochs ({epochs}) or minutes ({minutes:g}): leave one of them out.")
    if epochs is not None and epochs < 1:
        raise ConfigError(f"epochs must be at least 1, got {epochs}.")
    if minutes is not None and not 0 < minutes < math.inf:
        raise ConfigError(f"minutes must be a positive number, got {minutes}.")
    if max_detections < 1:
        raise ConfigError(f"max_detections must be at least 1, got {max_detections}.")
    if launched("WORLD_SIZE", 1) > 1:
        raise ConfigError(
            "maskset compare runs in one process: train on several with maskset train, and compare the run folders."
        )


def _plan_entries(models: Sequence[str | Path], dataset: Dataset, skip_broken: bool) -> dict[str, ComparisonEntry]:
    """Return a new entry for each recipe and model, by name."""
    entries: dict[str, ComparisonEntry] = {}
    for source in map(str, models):
        name = _name(source)
        if name in (JSON, TABLE, FIGURE):
            raise ConfigError(f"{source} would be called {name}, like a file of the comparison: rename it.")
        if name in entries:
            raise ConfigError(
                f"{entries[name].source} and {source} are both called {name}: rename the file or folder of one of them."
            )
        if _is_model(source):
            path = find(source)
            try:
                class_labels(read_metadata(path).categories, dataset.categories)
            except DataError as error:
                raise DataError(f"{source} cannot be compared on this data: {error}") from None
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            entries[name] = ComparisonEntry(name=name, source=source, digest=digest)
        else:
            entries[name] = ComparisonEntry(
                name=name, source=source, recipe=_without_early_stop(recipes.get(source), skip_broken)
            )
    if not entries:
        raise ConfigError("there is nothing to compare: pass recipes or trained models.")
    return entries


def _is_model(source: str) -> bool:
    return is_model(source) and not recipes.known(source)  # ./solq-tiny is a folder with the name of a recipe


def _name(source: str) -> str:
    """Return the name of a recipe or model; the checkpoints and the recipe of a run have the name of its folder."""
    path = Path(os.path.abspath(source))  # so that ".." has a name
    if path.suffix in (".json", ".safetensors"):
        return path.parent.name if path.stem in ("recipe", "best", "last") else path.stem
    return path.name if _is_model(source) else source.lower().replace("_", "-")


def _without_early_stop(recipe: Recipe, skip_broken: bool) -> Recipe:
    """Return the recipe with one evaluation at the end, no early stopping, and a log frequent enough to time steps."""
    schedule = replace(recipe.train, log_every=min(recipe.train.log_every, _LOG_EVERY), evaluate_every=0, patience=0)
    return replace(recipe, train=schedule, data=replace(recipe.data, skip_broken=skip_broken or recipe.data.skip_broken))


def _load_earlier(out: Path, settings: ComparisonSettings) -> dict[str, ComparisonEntry]:
    """Return the entries of earlier calls in the folder, by name.

    Raises:
        ConfigError: the folder holds something else, or a comparison with other settings.
    """
    if not (out / JSON).is_file():
        if any(file.name != LOCK_FILE for file in out.iterdir()):
            raise ConfigError(f"{out} is not empty and does not contain a comparison: choose a new folder with --out.")
        return {}
    earlier = config.read(Comparison, out / JSON)
    changed = "; ".join(state.differences(earlier.settings, settings))
    if changed:
        raise ConfigError(f"{out} contains another comparison: {changed}. Repeat its settings or choose a new folder with --out.")
    return {entry.name: entry for entry in earlier.models}


def _resume_entry(
    earlier: ComparisonEntry | None, new: ComparisonEntry, out: Path, settings: ComparisonSettings
) -> ComparisonEntry:
    """Return the entry to continue from: that of an earlier call if it fits, else the new one.

    Raises:
        ConfigError: the folder has another recipe or model of this name.
    """
    if earlier is None:
        return new
    if (earlier.recipe is None) != (new.recipe is None):
        was, is_now = ("a model", "a recipe") if earlier.recipe is None else ("a recipe", "a model")
        raise ConfigError(f"{new.name} was {was} in {out} and is {is_now} now: rename one, or choose a new folder with --out.")
    if new.recipe is None or earlier.recipe is None:
        return replace(earlier, source=new.source) if earlier.digest == new.digest else new  # it may have been moved
    if not (out / new.name / state.RECIPE).is_file():
        return new
    budget = {name: getattr(earlier.recipe.train, name) for name in ("steps", "warmup_steps")} if _has_budget(settings) else {}
    changed = "; ".join(state.differences(earlier.recipe, replace(new.recipe, train=replace(new.recipe.train, **budget))))
    if changed:
        raise ConfigError(
            f"{out / new.name} was trained with another recipe: {changed}. Rename the new one, or choose a new folder."
        )
    return replace(earlier, source=new.source)


def _has_budget(settings: ComparisonSettings) -> bool:
    return bool(settings.epochs or settings.minutes)


def _run_entry(
    entry: ComparisonEntry, settings: ComparisonSettings, dataset: Dataset, out: Path, progress: bool
) -> Iterator[ComparisonEntry]:
    """Train and evaluate a model as far as needed; yield its entry after each stage, so that it can be saved."""
    if entry.state == "done":
        return
    entry = replace(entry, state="started", problem="")
    output = Output(quiet=not progress, highlight=False, markup=False, soft_wrap=True)
    try:
        if entry.recipe is not None:
            if entry.gigabytes is None:
                output.print(f"\n{entry.name}: measuring the cost of a step")
                entry = _measure_cost(entry, entry.recipe, settings, progress)
                yield entry
            output.print(f"\n{entry.name}: training")
            entry = _train_entry(entry, settings, out / entry.name, progress)
        output.print(f"\n{entry.name}: evaluating")
        entry = _evaluate_entry(entry, dataset, settings, out, progress)
    except BrokenPipeError:  # the reader of the output is gone, which has nothing to do with the model
        raise
    except Exception as error:  # the other models continue
        expected = isinstance(error, (MasksetError, OSError))
        if not expected:
            traceback.print_exc()
        text = " ".join(str(error).split())
        entry = replace(entry, state="failed", problem=text if expected else f"{type(error).__name__}: {text}")
        Output(stderr=True, highlight=False, markup=False, soft_wrap=True).print(f"{entry.name} failed: {entry.problem}")
    gc.collect()
    torch.cuda.empty_cache()
    yield entry


def _measure_cost(entry: ComparisonEntry, recipe: Recipe, settings: ComparisonSettings, progress: bool) -> ComparisonEntry:
    """Return the entry with the cost of a step, and with the schedule scaled to the budget."""
    cost = measure_cost(
        recipe, settings.data, images=settings.images, seconds=_TRIAL * 60 * (settings.minutes or 0), progress=progress
    )
    if _has_budget(settings):
        steps = round(60 * settings.minutes / cost.seconds) if settings.minutes else (settings.epochs or 0) * cost.steps_per_epoch
        share = min(1.0, steps / step_count(cost.steps_per_epoch, recipe.train))
        changed = replace(recipe.train, steps=max(1, steps), warmup_steps=round(share * recipe.train.warmup_steps))
        recipe = replace(recipe, train=changed)
    return replace(entry, recipe=recipe, gigabytes=cost.gigabytes, device=cost.device)


def _train_entry(entry: ComparisonEntry, settings: ComparisonSettings, run: Path, progress: bool) -> ComparisonEntry:
    """Train or resume, and return the entry with step count and times from the log."""
    assert entry.recipe is not None
    resume = (run / state.RECIPE).is_file()
    train(entry.recipe, settings.data, run, resume=resume, images=settings.images, progress=progress)
    lines = [json.loads(line) for line in (run / state.METRICS).read_text().splitlines()]
    steps = max(line["step"] for line in lines)
    seconds = [line["seconds"] for line in lines if line["split"] == "train"]
    if not seconds:
        return replace(entry, steps=steps)
    median, minutes = statistics.median(seconds), statistics.mean(seconds) * steps / 60
    return replace(entry, steps=steps, seconds_per_step=median, minutes=minutes)


def _evaluate_entry(
    entry: ComparisonEntry, dataset: Dataset, settings: ComparisonSettings, out: Path, progress: bool
) -> ComparisonEntry:
    """Evaluate, write all metrics to the model's folder, and return the entry with the most important ones."""
    model = load_model(_weights(entry, out))
    metrics = evaluate(model, dataset, max_detections=settings.max_detections, progress=progress)
    metrics.save(out / entry.name)
    numbers = metrics.to_dict()
    return replace(
        entry,
        state="done",
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trainable_parameters=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        notes=tuple(metrics.notes()),
        **{name: numbers[name] for name in MEASURED},
    )


def _weights(entry: ComparisonEntry, out: Path) -> Path:
    """Return the checkpoint of a model; for recipes the last one, not the best."""
    return find(entry.source) if entry.recipe is None else out / entry.name / state.LAST


def _write_table_and_figure(comparison: Comparison, dataset: Dataset, out: Path) -> None:
    """Write the table and the figure."""
    with atomic_write(out / TABLE) as part:
        part.write_text(f"# Comparison\n\n{comparison}\n", encoding="utf-8")
    done = [entry for entry in comparison.models if entry.state == "done"]
    if done:
        columns = {entry.name: (f"AP {format_number(entry.mask_ap, '{:.3f}')}", _weights(entry, out)) for entry in done}
        draw_figure(columns, dataset, out / FIGURE)
