"""Several recipes and models on the same data: trained with one budget, measured in one way, shown in one table and figure."""

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
from typing import Any

import torch

from maskset import config as settings
from maskset import recipes
from maskset.checkpoint import find, is_model, read_metadata
from maskset.comparison.figure import draw_figure
from maskset.comparison.results import FIGURE, JSON, MEASURED, TABLE, Compared, Comparison, Terms, format_number
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

_TRIAL = 0.05  # share of the minutes that a trial measures the speed for
_LOG_EVERY = 10  # optimiser steps between lines of a run's log, at the most: seconds per step are taken from them


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
    """Return how recipes and trained models do on the same data; `print` shows the table.

    Recipes are trained in runs of their own inside of `out`, trained models are only measured. `out` gets comparison.json,
    comparison.md with the table, and comparison.png with a few images side by side. The same call goes on where it was stopped:
    what is done is not done again, and models can be added. One that fails is noted, and the others go on.

    With `epochs` or `minutes` the schedule of a recipe is shrunk or stretched, so that learning rates come down at the end of
    every run. Minutes become a number of optimiser steps before the run, by a trial of its speed: a schedule that followed the
    clock would end on time more exactly, but no run could be repeated. So minutes are kept as far as the speed stays what it was
    in the trial; the table has those that were needed. Trial and evaluations take time beyond them.

    Args:
        models: names of recipes, recipe.json files, or what `maskset.load` takes.
        data: what `maskset.data.open_data` takes; recipes learn from its part "train".
        out: folder of the comparison.
        epochs: how long each recipe is trained.
        minutes: how long each recipe is trained. Without both, each has its own number of epochs.
        images: the folder of the images, where `data` is a JSON file.
        split: the part of the data that the models are measured on.
        max_detections: how many objects of an image count, best first.
        skip_broken: leave out broken images and annotations, in training too.
        progress: whether to print how far it is.

    Raises:
        ConfigError: there is no such recipe, two models have the same name, a budget is not possible, or `out` holds another
            comparison, or another process writes into it.
        CheckpointError: a model is no checkpoint.
        DataError: the data cannot be used, or a trained model knows none of its classes.
        KeyboardInterrupt: Ctrl-C came; the same call goes on.
    """
    _check_call(epochs, minutes, max_detections)
    out, dataset = Path(out), open_data(data, split, images, skip_broken)
    models_by_name = _resolve([models] if isinstance(models, (str, Path)) else models, dataset, skip_broken)
    terms = Terms(
        data="shapes:" if isinstance(dataset, ShapesDataset) else str(Path(data).absolute()),
        images=None if images is None else str(Path(images).absolute()),
        split=split,
        epochs=epochs,
        minutes=minutes,
        max_detections=max_detections,
        skip_broken=skip_broken,
        measured=len(dataset),
        classes=tuple(category.name for category in dataset.categories),
    )
    with lock_folder(out):
        known = _known(out, terms)
        entries = {name: _continued(known.get(name), new, out, terms) for name, new in models_by_name.items()}
        try:
            Comparison(terms=terms, models=tuple((known | entries).values())).save(out / JSON)
            for name in entries:
                for entry in _advanced(entries[name], terms, dataset, out, progress):
                    entries[name] = entry
                    Comparison(terms=terms, models=tuple((known | entries).values())).save(out / JSON)
            earlier = {name: entry for name, entry in known.items() if entry.state == "done"}
            comparison = Comparison(terms=terms, models=tuple((earlier | entries).values()))
            _show(comparison, dataset, out)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"the same command continues the comparison in {out}.") from None
    return comparison


def _check_call(epochs: int | None, minutes: float | None, max_detections: int) -> None:
    if epochs is not None and minutes is not None:
        raise ConfigError(f"the budget is either epochs ({epochs}) or minutes ({minutes:g}): leave one of them out.")
    if epochs is not None and epochs < 1:
        raise ConfigError(f"epochs must be at least 1, got {epochs}.")
    if minutes is not None and not 0 < minutes < math.inf:
        raise ConfigError(f"minutes must be a positive number, got {minutes}.")
    if max_detections < 1:
        raise ConfigError(f"max_detections must be at least 1, got {max_detections}.")
    if launched("WORLD_SIZE", 1) > 1:
        raise ConfigError("a comparison is one process: train with several by maskset train, and compare the run folders.")


def _resolve(models: Sequence[str | Path], dataset: Dataset, skip_broken: bool) -> dict[str, Compared]:
    """Return a new entry for each recipe and model, by name."""
    entries: dict[str, Compared] = {}
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
            entries[name] = Compared(name=name, source=source, digest=digest)
        else:
            entries[name] = Compared(name=name, source=source, recipe=_quiet(recipes.get(source), skip_broken))
    if not entries:
        raise ConfigError("there is nothing to compare: name recipes or trained models.")
    return entries


def _is_model(source: str) -> bool:
    return is_model(source) and not recipes.known(source)  # ./solq-tiny is a folder with the name of a recipe


def _name(source: str) -> str:
    """Return the name of a recipe or model; the checkpoints and the recipe of a run have the name of its folder."""
    path = Path(os.path.abspath(source))  # so that ".." has a name
    if path.suffix in (".json", ".safetensors"):
        return path.parent.name if path.stem in ("recipe", "best", "last") else path.stem
    return path.name if _is_model(source) else source.lower().replace("_", "-")


def _quiet(recipe: Recipe, skip_broken: bool) -> Recipe:
    """Return the recipe without evaluations in between, which might end it early, and with a log that times can be taken from."""
    config = replace(recipe.train, log_every=min(recipe.train.log_every, _LOG_EVERY), evaluate_every=0, patience=0)
    return replace(recipe, train=config, data=replace(recipe.data, skip_broken=skip_broken or recipe.data.skip_broken))


def _known(out: Path, terms: Terms) -> dict[str, Compared]:
    """Return what the folder has of earlier calls, by name.

    Raises:
        ConfigError: the folder holds something else, or a comparison with other terms.
    """
    if not (out / JSON).is_file():
        if any(file.name != LOCK_FILE for file in out.iterdir()):
            raise ConfigError(f"{out} is not empty and holds no comparison: choose a new folder with --out.")
        return {}
    earlier = settings.read(Comparison, out / JSON)
    changed = _changes(earlier.terms, terms)
    if changed:
        raise ConfigError(f"{out} holds another comparison: {changed}. Repeat its settings, or choose a new folder with --out.")
    return {entry.name: entry for entry in earlier.models}


def _changes(old: Any, new: Any) -> str:
    """Return what differs between two of the same settings; nothing if they are equal."""
    before, after = state.flat(settings.to_dict(old)), state.flat(settings.to_dict(new))
    return "; ".join(f"{key} was {before.get(key)}, is {value}" for key, value in after.items() if before.get(key) != value)


def _continued(earlier: Compared | None, new: Compared, out: Path, terms: Terms) -> Compared:
    """Return where to go on with a model: what an earlier call did, where that is still what is wanted.

    Raises:
        ConfigError: what is there under this name is something else.
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
    budget = {name: getattr(earlier.recipe.train, name) for name in ("steps", "warmup_steps")} if _has_budget(terms) else {}
    changed = _changes(earlier.recipe, replace(new.recipe, train=replace(new.recipe.train, **budget)))
    if changed:
        raise ConfigError(
            f"{out / new.name} was trained with another recipe: {changed}. Name the new one otherwise, or choose a new folder."
        )
    return replace(earlier, source=new.source)


def _has_budget(terms: Terms) -> bool:
    return bool(terms.epochs or terms.minutes)


def _advanced(entry: Compared, terms: Terms, dataset: Dataset, out: Path, progress: bool) -> Iterator[Compared]:
    """Do what is still to do for a model, and yield the entry whenever there is something new to keep."""
    if entry.state == "done":
        return
    entry = replace(entry, state="begun", problem="")
    output = Output(quiet=not progress, highlight=False, markup=False, soft_wrap=True)
    try:
        if entry.recipe is not None:
            if entry.gigabytes is None:
                output.print(f"\n{entry.name}: a trial of a few steps")
                entry = _tried(entry, entry.recipe, terms, progress)
                yield entry
            output.print(f"\n{entry.name}: training")
            entry = _trained(entry, terms, out / entry.name, progress)
        output.print(f"\n{entry.name}: measuring")
        entry = _measured(entry, dataset, terms, out, progress)
    except BrokenPipeError:  # nobody reads what is printed: no fault of the model
        raise
    except Exception as error:  # whatever it is, the other models go on
        known = isinstance(error, (MasksetError, OSError))
        if not known:
            traceback.print_exc()
        text = " ".join(str(error).split())
        entry = replace(entry, state="failed", problem=text if known else f"{type(error).__name__}: {text}")
        Output(stderr=True, highlight=False, markup=False, soft_wrap=True).print(f"{entry.name} failed: {entry.problem}")
    gc.collect()
    torch.cuda.empty_cache()
    yield entry


def _tried(entry: Compared, recipe: Recipe, terms: Terms, progress: bool) -> Compared:
    """Return the entry with what a step costs, and with the schedule brought to the steps that the budget is worth."""
    cost = measure_cost(recipe, terms.data, images=terms.images, seconds=_TRIAL * 60 * (terms.minutes or 0), progress=progress)
    if _has_budget(terms):
        steps = round(60 * terms.minutes / cost.seconds) if terms.minutes else (terms.epochs or 0) * cost.steps_per_epoch
        share = min(1.0, steps / step_count(cost.steps_per_epoch, recipe.train))
        changed = replace(recipe.train, steps=max(1, steps), warmup_steps=round(share * recipe.train.warmup_steps))
        recipe = replace(recipe, train=changed)
    return replace(entry, recipe=recipe, gigabytes=cost.gigabytes, device=cost.device)


def _trained(entry: Compared, terms: Terms, run: Path, progress: bool) -> Compared:
    """Train, or go on, and return the entry with what the log says."""
    assert entry.recipe is not None
    resume = (run / state.RECIPE).is_file()
    train(entry.recipe, terms.data, run, resume=resume, images=terms.images, progress=progress)
    lines = [json.loads(line) for line in (run / state.METRICS).read_text().splitlines()]
    steps = max(line["step"] for line in lines)
    seconds = [line["seconds"] for line in lines if line["split"] == "train"]
    if not seconds:
        return replace(entry, steps=steps)
    median, minutes = statistics.median(seconds), statistics.mean(seconds) * steps / 60
    return replace(entry, steps=steps, seconds_per_step=median, minutes=minutes)


def _measured(entry: Compared, dataset: Dataset, terms: Terms, out: Path, progress: bool) -> Compared:
    """Evaluate, keep all numbers in the model's folder, and return the entry with the most important ones."""
    model = load_model(_weights(entry, out))
    metrics = evaluate(model, dataset, max_detections=terms.max_detections, progress=progress)
    metrics.save(out / entry.name)
    numbers = metrics.to_dict()
    return replace(
        entry,
        state="done",
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trained_parameters=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        notes=tuple(metrics.notes()),
        **{name: numbers[name] for name in MEASURED},
    )


def _weights(entry: Compared, out: Path) -> Path:
    """Return the checkpoint of a model: of one that was trained here the last, so that evaluations in between change nothing."""
    return find(entry.source) if entry.recipe is None else out / entry.name / state.LAST


def _show(comparison: Comparison, dataset: Dataset, out: Path) -> None:
    """Write the table and the figure."""
    with atomic_write(out / TABLE) as part:
        part.write_text(f"# Comparison\n\n{comparison}\n", encoding="utf-8")
    done = [entry for entry in comparison.models if entry.state == "done"]
    if done:
        columns = {entry.name: (f"AP {format_number(entry.mask_ap, '{:.3f}')}", _weights(entry, out)) for entry in done}
        draw_figure(columns, dataset, out / FIGURE)
