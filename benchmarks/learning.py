"""How fast systems learn at equal computing time, against torchvision's Mask R-CNN and transformers' Mask2Former.

All models have the same images, augmentation, input size, batch size, backbone with the same initial weights, and evaluator. Each
is trained for the same time: CPU seconds of the process, or seconds on a GPU. Reading images counts, evaluation does not.
The schedule of each recipe follows the used share of the time: in each step it is scaled to the number of steps that fit into
the time at the mean speed so far. If a trial fixed the number of steps, every later change of the machine's speed or of the cost
of a step would give a model more or less time than the others.
"""

import argparse
import difflib
import math
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torchvision.ops import batched_nms

from benchmarks import curves, page
from benchmarks.measure import require
from benchmarks.peers import PEERS
from benchmarks.report import where
from benchmarks.training import step as compute_gradients
from maskset import flags, recipes
from maskset.data import Dataset, open_data, shapes
from maskset.errors import ConfigError, MasksetError, TrainingDiverged
from maskset.evaluation.average_precision import average_precision
from maskset.evaluation.evaluate import detections_in
from maskset.instances import Instances
from maskset.recipe import Recipe
from maskset.recipes.backbones import PRETRAINED, PRETRAINED_INPUT, SCRATCH
from maskset.training.guards import explain_shortages, restore_process_settings
from maskset.training.optimizer import rate_factor, set_learning_rates
from maskset.training.run import Run, open_run
from maskset.training.state import seed_everything
from maskset.training.step import NotFinite, average, update

SHARES = 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0  # of the time after which models are evaluated
_NMS_IOU = 0.5
_COMMON = "data.", "model.input.", "train.batch_size", "train.accumulate", "train.seed"  # settings that all models share


@dataclass(frozen=True)
class Setting:
    """What all models of a file of results have in common.

    Attributes:
        data: name of the data.
        train_images: number of images to train on.
        val_images: number of images to evaluate on.
        classes: number of classes.
        minutes: of training.
        device: what computes, and whose time counts.
        backbone: name of the backbone.
        pretrained: whether it starts from ImageNet weights, with frozen norms; else from scratch, with group norm.
        short_sides: shorter sides to draw from in training, pixels.
        short_side: shorter side at evaluation, pixels.
        long_side: maximum longer side, pixels.
        batch_size: images in a step.
        max_detections: detections of an image that count.
    """

    data: str
    train_images: int
    val_images: int
    classes: int
    minutes: float
    device: str
    backbone: str
    pretrained: bool
    short_sides: list[int]
    short_side: int
    long_side: int
    batch_size: int
    max_detections: int


def run(options: argparse.Namespace) -> int:
    """Run the benchmark and return the exit code: 0 done, 1 a model failed, 2 invalid input, 130 interrupted."""
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # else training chooses the number of threads
    torch.set_num_threads(options.threads)
    with ExitStack() as stack:
        try:
            if options.quick:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()), "shapes")
                options.data = str(shapes.write(folder, {"train": 4, "val": 2}, (64, 64)))
            failures = learn(options)
        except (MasksetError, OSError) as error:
            print(f"benchmarks: error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted: the same command continues with the runs that are missing.", file=sys.stderr)
            return 130
    return 1 if failures else 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the values of the flags."""
    about, small = (__doc__ or "").split("\n\n")[0], [name for name in recipes.RECIPES if name.endswith("-small")]
    parser = argparse.ArgumentParser(prog="python -m benchmarks learning", description=about, allow_abbrev=False)
    parser.add_argument("data", metavar="DATA", nargs="?", help="data folder with splits train and val, or shapes:")
    names = f"recipes, and {' and '.join(PEERS)} (default: all small recipes and these); with other settings: NAME:SETTING=VALUE"
    parser.add_argument("--models", nargs="+", metavar="NAME", help=names)
    parser.add_argument("--minutes", type=float, default=20.0, help="training time of each model (default: 20)")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0], metavar="N", help="one run of each model for each (default: 0)"
    )
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--pretrained", action="store_true", help=f"all models have {PRETRAINED.name} with ImageNet weights")
    start.add_argument("--scratch", action="store_true", help=f"all models have {SCRATCH.name} with random weights (default)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (default: 1)")
    results = "folder for results/learning-*.json, a figure, and a README.md with all results (default: only print)"
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=results)
    parser.add_argument("--again", action="store_true", help="repeat runs whose results are in the folder already")
    quick = "a few steps of tiny models on generated shapes instead of DATA: checks only that everything runs"
    parser.add_argument("--quick", action="store_true", help=quick)
    options = parser.parse_args(arguments)
    if options.data is None and not options.quick:
        parser.error("DATA is missing: give a data folder, or shapes: (generated).")
    if options.quick and options.out is not None:
        parser.error("the figures of --quick are not worth keeping: leave out --quick or --out.")
    if not options.minutes > 0 or options.threads < 1 or min(options.seeds) < 0:
        parser.error("--minutes must be above 0, --threads at least 1, and --seeds at least 0.")
    options.name = "learning"
    options.models = options.models or [*(["solq-tiny"] if options.quick else small), *PEERS]
    return options


def learn(options: argparse.Namespace) -> list[str]:
    """Train and evaluate what is missing, print and write the results, and return the names of models that failed."""
    setting = setting_of(options)
    plan = [(name, seed) for seed in options.seeds for name in options.models]
    recipe_of_run = {(name, seed): recipe_of(name, setting, seed) for name, seed in plan}  # all names are checked first
    require(
        *(["transformers"] if any(name.startswith("mask2former") for name in options.models) else []),
        *(["matplotlib"] if options.out else []),
    )
    if options.out is not None:
        page.check(options.out)
    result = curves.read(asdict(setting), None if options.out is None else options.out / "results")
    failures = []
    for name, seed in plan:
        title = f"{name}, seed {seed}"
        if not options.again and any((done["model"], done["seed"]) == (name, seed) for done in result["runs"]):
            print(f"{title}: done already; --again repeats it.", flush=True)
            continue
        try:
            measured = measure(recipe_of_run[name, seed], options.data, setting, title)
        except MasksetError as error:
            print(f"{title} failed: {error}", file=sys.stderr)
            failures.append(name)
            continue
        record = {"model": name, "seed": seed, **measured, "command": command(name, seed, setting, options.threads), **where()}
        if options.out is None:
            result["runs"].append(record)
        else:
            result = write(record, setting, options.out)
    if result["runs"]:
        print("", *page.learning_section(result), sep="\n\n")
    return failures


def write(record: dict[str, Any], setting: Setting, folder: Path) -> dict[str, Any]:
    """Add a run to the results in a folder, draw and write everything that follows from them, and return all of the setting."""
    path = curves.save(record, asdict(setting), folder / "results")
    result = curves.read(asdict(setting), folder / "results")
    figure = curves.draw(result, folder / f"{path.stem}.svg")
    print(f"written: {path}, {figure}, {page.write(folder)}", flush=True)
    return result


def setting_of(options: argparse.Namespace) -> Setting:
    """Return what the models have in common.

    Raises:
        DataError: there is no such data.
    """
    train_data, val_data = (open_data(options.data, split) for split in ("train", "val"))
    small = recipes.get("solq-small")
    gpu = torch.cuda.is_available()
    return Setting(
        data=Path(options.data).name.rstrip(":").lower(),
        train_images=len(train_data),
        val_images=len(val_data),
        classes=len(train_data.categories),
        minutes=0.002 if options.quick else options.minutes,
        device=torch.cuda.get_device_name() if gpu else f"CPU, {options.threads} thread{'s' * (options.threads > 1)}",
        backbone=(PRETRAINED if options.pretrained else SCRATCH).name,
        pretrained=options.pretrained,
        short_sides=[64] if options.quick else list(small.data.short_sides),
        short_side=64 if options.quick else small.model.input.short_side,
        long_side=96 if options.quick else small.data.long_side,
        batch_size=2 if options.quick else small.train.batch_size,
        max_detections=20 if options.quick else small.train.max_detections,
    )


def recipe_of(name: str, setting: Setting, seed: int) -> Recipe:
    """Return a model's recipe with the common setting; its own are the model, the optimizer and its schedule.

    Raises:
        ConfigError: there is no such recipe or peer.
    """
    small = recipes.get("solq-small")
    name, *changes = name.split(":")
    if name not in PEERS and not recipes.known(name):
        raise ConfigError(f"there is no model {name!r}: --models takes {', '.join([*PEERS, *recipes.RECIPES])}.")
    own = replace(small, model=PEERS[name]()) if name in PEERS else recipes.get(name)
    sides = {"short_side": setting.short_side, "long_side": setting.long_side}
    input = replace(own.model.input, **sides)
    if setting.pretrained:
        input = replace(input, mean=PRETRAINED_INPUT.mean, std=PRETRAINED_INPUT.std, channel_order=PRETRAINED_INPUT.channel_order)
    data = replace(small.data, short_sides=tuple(setting.short_sides), long_side=setting.long_side, workers=0)
    recipe = Recipe(
        model=replace(own.model, input=input, backbone=PRETRAINED if setting.pretrained else SCRATCH),
        data=data,
        train=replace(own.train, batch_size=setting.batch_size, accumulate=1, seed=seed),
    )
    return flags.apply(recipe, dict(_change(recipe, name, change) for change in changes))


def _change(recipe: Recipe, name: str, change: str) -> tuple[str, str]:
    """Return name and value of a setting from NAME=VALUE.

    Raises:
        ConfigError: there is no such setting, it has no value, or all models have it in common.
    """
    setting, _, value = change.partition("=")
    known = [other.name for other in flags.flatten(recipe)]
    if setting not in known:
        near = difflib.get_close_matches(setting, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "such as model.num_queries=100."
        raise ConfigError(f"{name}:{change}: there is no setting {setting!r}; {hint}")
    if setting.startswith(_COMMON):
        raise ConfigError(f"{name}:{change}: {setting} is the same for all models of a benchmark.")
    if not value:
        raise ConfigError(f"{name}:{change}: the value of {setting} is missing, as in {setting}=2.")
    return setting, value


@restore_process_settings()
@explain_shortages()
def measure(recipe: Recipe, data: str, setting: Setting, title: str) -> dict[str, Any]:
    """Train a model for the time of the setting, and return its results at each share of it.

    Raises:
        MasksetError: training cannot start, or diverges.
    """
    with tempfile.TemporaryDirectory() as folder:  # nothing is written
        run, lines = open_run(recipe, data, Path(folder), None, False, None, progress=False)
    facts = [line for line in lines if line.startswith(("model:", "backbone", "warning:"))]  # the rest is about folder and epochs
    print(f"\n{title}", *facts, sep="\n", flush=True)
    model, budget, points, shares = run.state.model.train(), 60 * setting.minutes, [], list(SHARES)
    trial = compute_one_gradient(run)
    print(f"trial: {trial:.1f} s for a step and what is done once, which does not count", flush=True)
    for seconds in train(run, budget):
        if seconds < shares[0] * budget:
            continue
        detections = list(detections_in(run.eval_model, run.val_data, range(len(run.val_data)), setting.max_detections))
        metrics = average_precision(run.val_data, detections, setting.max_detections).to_dict()
        metrics["mask_ap_with_nms"] = mask_ap_with_nms(detections, run.val_data, setting.max_detections)
        values = {name: _rounded(metrics[name]) for name in (*curves.METRICS, "mask_ap_with_nms")}
        while shares and seconds >= shares[0] * budget:
            points.append({"share": shares.pop(0), "seconds": round(seconds, 2), "steps": run.progress.step, **values})
        print(f"{title}: {seconds:,.0f} of {budget:,.0f} s, step {run.progress.step}: {_text(values)}", flush=True)
        if not shares:
            break
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {
        "system": recipe.model.system,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trained_parameters": trained,
        "trial_seconds": round(trial, 2),
        "points": points,
    }


def mask_ap_with_nms(detections: Iterable[tuple[int, Instances]], dataset: Dataset, max_detections: int) -> float:
    """Return the mask AP after greedy NMS of the detections' boxes in each class: no better than without, if none is needed."""
    remaining = []
    for index, found in detections:
        assert found.scores is not None
        remaining.append((index, found[batched_nms(found.boxes, found.scores, found.labels, _NMS_IOU)]))
    return average_precision(dataset, remaining, max_detections).mask_ap


def _rounded(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else round(value, 4)


def compute_one_gradient(run: Run) -> float:
    """Compute and discard a gradient, with what is done once (imports, compilation, first allocations); return its seconds."""
    start = clock()
    images, targets = next(run.batches(0))
    compute_gradients(run.state.model, (images.to(run.accelerator.device).normalized(run.state.model.input), targets))
    return clock() - start


def train(run: Run, budget: float) -> Iterator[float]:
    """Do optimizer steps without end; after each, yield the seconds that steps, and reading their images, took so far.

    Raises:
        TrainingDiverged: the loss or its gradient is not finite.
    """
    config, state, progress = run.recipe.train, run.state, run.progress
    seconds, start = 0.0, clock()
    while True:
        for batch in run.batches(progress.epoch):
            expected = round(progress.step * budget / seconds) if seconds else 0  # steps of the whole time
            schedule = replace(config, steps=max(progress.step + 1, expected))
            seed_everything(config.seed, progress.step, 0)
            set_learning_rates(state.optimizer, rate_factor(progress.step, run.steps, schedule))
            try:
                update(run.accelerator, run.step, state.optimizer, [batch], config.clip_norm)
            except NotFinite as problem:
                raise TrainingDiverged(f"training diverged in step {progress.step}: {problem.reason}") from None
            progress.step += 1
            if state.averaged is not None:
                average(state.averaged, state.model, config.ema_decay, progress.step)
            seconds += clock() - start
            yield seconds
            start = clock()
        progress.epoch += 1


def clock() -> float:
    """Return the time that counts, in seconds: of the CPU in this process, or on a GPU until it has computed everything."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def command(name: str, seed: int, setting: Setting, threads: int) -> str:
    """Return the command that repeats a run."""
    words = ["--models", name, "--minutes", f"{setting.minutes:g}", "--seeds", str(seed)]
    words += ["--pretrained"] if setting.pretrained else []
    words += ["--threads", str(threads)] if threads > 1 else []
    return shlex.join(["python", "-m", "benchmarks", "learning", setting.data, *words])


def _text(values: dict[str, float | None]) -> str:
    numbers = {label: values[name] for name, label in curves.METRICS.items()}
    return ", ".join(f"{label} {'-' if number is None else format(number, '.3f')}" for label, number in numbers.items())
