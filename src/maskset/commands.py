"""The commands: each declares its flags, calls one public function and prints the result.

Flags are named like the parameters of that function. Slow imports happen inside the commands, so that help and errors in the
arguments appear at once. Help fits on 24 lines of 80 characters; see `maskset train RECIPE --help-all` for all settings.
"""

import json
import os
from argparse import SUPPRESS, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pkgutil import iter_modules

from maskset.arguments import FIRST_SETTINGS, count, new_file, new_folder, new_json, usable_device
from maskset.errors import MasksetError


def _modules(folder: str) -> set[str]:
    """Return the names of the modules in a folder of the package, without importing them, which takes seconds."""
    return {module.name for module in iter_modules([str(Path(__file__).parent / folder)])}


CONVERTIBLE = ", ".join(sorted(name.replace("_", "-") for name in _modules("systems") & _modules("conversion")))


def _demo_flags(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the model and the images (default: demo)")


def _demo(options: Namespace) -> None:
    """Detect nuclei, then train on generated images (4 minutes)."""
    from maskset.demo import demo

    demo(options.out)


@contextmanager
def _before_training() -> Iterator[None]:
    """Say on Ctrl-C that nothing was written, as training itself does before its first step."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise type(interrupt)("stopped before the first step: nothing was written.") from None


@_before_training()
def _train_flags(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    name = arguments[0] if arguments and not arguments[0].startswith("-") else None
    parser.usage = "%(prog)s RECIPE --data DATA --out RUN [--SETTING VALUE ...]"
    parser.description = f"{_train.__doc__} RECIPE comes first: a name that\n`maskset recipes` lists, or a recipe.json."
    parser.formatter_class = RawDescriptionHelpFormatter
    parser.add_argument("recipe", metavar="RECIPE", help=SUPPRESS)
    _add_data(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="folder of the run")
    parser.add_argument("--init", metavar="MODEL", help="model to start from; classes and queries may differ")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out; more --train.epochs extend it")
    parser.add_argument("--help-all", action="help", help=SUPPRESS)
    defaults = {}
    if name is not None:
        from maskset import flags, recipes

        settings = recipes.get(name)
        parser.set_defaults(settings=settings)
        flags.add(parser, settings, visible=None if "--help-all" in arguments else ())
        defaults = {setting.name: setting.text for setting in flags.flatten(settings)}
    elif not any(flag in arguments for flag in ("-h", "--help", "--help-all")):
        parser.error("the recipe comes first: maskset train RECIPE --data DATA --out RUN; `maskset recipes` lists them")
    if "--help-all" not in arguments or name is None:
        parser.epilog = _first_settings(name or "RECIPE", defaults)


def _first_settings(recipe: str, defaults: Mapping[str, str]) -> str:
    """Return the text about the settings that matter first, with their values in the recipe."""
    lines = [f"settings (all, with their defaults: maskset train {recipe} --help-all):"]
    for name, (value, help) in FIRST_SETTINGS.items():
        default = f" (default: {defaults[name]})" if defaults else ""
        lines.append(f"  {'--' + name.replace('_', '-')} {value}".ljust(35) + help + default)
    return "\n".join(lines)


def _train(options: Namespace) -> None:
    """Train a recipe on annotated images."""
    with _before_training():
        from maskset import flags
        from maskset.training.train import train

    recipe = flags.apply(options.settings, vars(options))
    metrics = train(recipe, options.data, options.out, init=options.init, resume=options.resume, images=options.images)
    if os.environ.get("RANK", "0") == "0":  # only the first of several processes prints
        print(metrics)


def _evaluate_flags(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    _add_model(parser)
    _add_data(parser)
    parser.add_argument("--split", default="val", help="split of the data (default: val)")
    _add_max_detections(parser)
    parser.add_argument("--skip-broken", action="store_true", help="leave out broken images and annotations")
    _add_device(parser)
    parser.add_argument("--out", type=new_folder, metavar="FOLDER", help="write metrics.json and per_class.csv here")


def _evaluate(options: Namespace) -> None:
    """Print COCO's average precision of a model on annotated images."""
    from maskset.evaluation.evaluate import evaluate

    arguments = vars(options)
    out = arguments.pop("out")
    metrics = evaluate(**arguments)
    print(metrics)
    if out:
        print(f"\nwritten to {metrics.save(out)}")


def _predict_flags(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    _add_model(parser)
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help='image files, folders, or patterns like "photos/*.jpg"')
    parser.add_argument(
        "--out", type=new_folder, default="predictions", metavar="FOLDER", help="output folder (default: predictions)"
    )
    parser.add_argument("--threshold", type=float, metavar="S", default=0.5, help="minimum score of an object (default: 0.5)")
    parser.add_argument("--limit", type=count, metavar="N", help="maximum number of objects per image (default: the model's)")
    parser.add_argument(
        "--save",
        nargs="*",
        choices=("drawings", "labels"),
        default=["drawings"],
        help="images beside results.json (default: drawings)",
    )
    parser.add_argument("--skip-broken", action="store_true", help="leave out files that cannot be read")
    _add_device(parser)


def _predict(options: Namespace) -> None:
    """Detect objects in images; write COCO results and drawings."""
    from maskset.inference.predict import predict_files
    from maskset.instances.saving import save_predictions

    arguments = vars(options)
    out, save = arguments.pop("out"), arguments.pop("save")
    save_predictions(predict_files(**arguments), out, drawings="drawings" in save, labels="labels" in save)
    print("written: " + ", ".join(str(out / name) for name in ["results.json", *save]))


def _compare_flags(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    help = "recipes to train, and trained models to evaluate"
    parser.add_argument("models", nargs="+", metavar="RECIPE|MODEL", help=help)
    _add_data(parser)
    parser.add_argument(
        "--out",
        type=new_folder,
        required=True,
        metavar="FOLDER",
        help="output folder; a comparison in it is resumed",
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--epochs", type=count, metavar="N", help="epochs for each recipe (default: its own)")
    budget.add_argument("--minutes", type=float, metavar="M", help="minutes for each recipe, instead of epochs")
    parser.add_argument("--split", default="val", help="split to evaluate on (default: val)")
    _add_max_detections(parser)
    parser.add_argument("--skip-broken", action="store_true", help="leave out broken images and annotations")


def _compare(options: Namespace) -> None:
    """Train recipes with one budget; compare them and models."""
    with _before_training():
        from maskset.comparison.compare import compare

    comparison = compare(**vars(options))
    print(f"\n{comparison}\n\nwritten to {options.out}")
    if comparison.failed:
        names = ", ".join(model.name for model in comparison.failed)
        raise MasksetError(f"failed: {names} (see above). The others are done; run the same command to try again.")


def _codecs_fit_flags(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    parser.add_argument("kind", metavar="KIND", help="pca, sparse, logit-pca or autoencoder")
    parser.add_argument("data", metavar="DATA", help="data folder, COCO JSON file, or shapes: (generated)")
    parser.add_argument("out", type=new_file, metavar="OUT", help="the .safetensors file to write")
    parser.add_argument("--size", type=count, metavar="S", help="side of the mask, pixels (default: 28; autoencoder: 112)")
    parser.add_argument("--length", type=count, metavar="D", help="numbers per mask (default: 60; sparse, autoencoder: 256)")
    parser.add_argument("--beta", type=float, metavar="B", help="sparse: weight of sparsity (default: 0.3 * size / 28)")
    parser.add_argument("--steps", type=count, metavar="N", help="autoencoder: batches of 64 masks (default: 3000)")
    _add_masks(parser, "train")


def _codecs_fit(options: Namespace) -> None:
    """Fit a mask codec to the masks of a data set."""
    from maskset.codec_tools.fit import fit_codec

    codec = fit_codec(**vars(options))
    print(f"written to {options.out}: {options.kind}, {codec.length} numbers for a mask of {codec.size} x {codec.size} pixels")


def _codecs_compare_flags(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    parser.add_argument("data", nargs="+", metavar="DATA", help="data folders, COCO JSON files, or shapes: (generated images)")
    parser.add_argument("--fit-split", default="train", metavar="SPLIT", help="part of the data to fit to (default: train)")
    parser.add_argument("--out", type=new_json, metavar="FILE", help="write the table as JSON here")
    _add_masks(parser, "val")


def _codecs_compare(options: Namespace) -> None:
    """Print how well each mask codec reconstructs real masks."""
    from maskset.codec_tools.compare import compare_codecs

    arguments = vars(options)
    out = arguments.pop("out")
    comparison = compare_codecs(**arguments)
    print(comparison)
    if out:
        print(f"\nwritten to {comparison.save(out)}")


def _convert_flags(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    parser.add_argument("system", metavar="SYSTEM", help=f"system of the checkpoint: {CONVERTIBLE}")
    parser.add_argument("source", type=Path, metavar="FILE", help="the official .pth file")
    parser.add_argument("out", type=new_file, metavar="OUT", help="the .safetensors file to write")
    parser.add_argument("--coco80", action="store_true", help="keep COCO's 80 classes of the 91 channels")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="text file with one class name per line")
    parser.add_argument("--use-last-copy", action="store_true", help="where copies of a tensor differ, use the last")
    parser.add_argument(
        "--from",
        dest="start",
        choices=["deformable-detr"],
        help="mmdetection's model in FILE, from which fitting weights are taken",
    )
    parser.add_argument("--license", default="unknown", help="license of the weights, recorded in the file (default: unknown)")


def _convert(options: Namespace) -> None:
    """Convert an official checkpoint to maskset's format."""
    from maskset.conversion import convert_file, initialize_file

    settings = {"classes": options.classes, "use_last_copy": options.use_last_copy, "license": options.license}
    if options.start and options.coco80:
        raise MasksetError("--coco80 cannot be combined with --from: mmdetection's Deformable DETR has 80 classes.")
    if options.start:
        print(initialize_file(options.system, options.source, options.out, **settings))
    else:
        print(convert_file(options.system, options.source, options.out, coco80=options.coco80, **settings))
    print(f"written to {options.out}")


def _recipes(options: Namespace) -> None:
    """List the recipes."""
    from maskset.recipes import RECIPES

    width = max(map(len, RECIPES)) + 2
    for name, recipe in RECIPES.items():
        print(f"{name:{width}}{(recipe.__doc__ or '').splitlines()[0]}")


def _show_flags(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    parser.add_argument("recipe_or_model", metavar="RECIPE|MODEL", help="recipe, recipe.json, checkpoint, run folder or nuclei")
    parser.add_argument("--json", action="store_true", help="print a recipe.json to edit and train")


def _show(options: Namespace) -> None:
    """Print the settings of a recipe or a model."""
    from maskset import checkpoint, config, flags, recipes

    if checkpoint.is_model(options.recipe_or_model) and not recipes.known(options.recipe_or_model):
        metadata = checkpoint.read_metadata(checkpoint.find(options.recipe_or_model))
        recipe, names = metadata.recipe, ", ".join(category.name for category in metadata.categories)
        about = f"classes: {names}\nsource: {metadata.source or 'trained here'}\nlicense: {metadata.license}\n\n"
    else:
        recipe, about = recipes.get(options.recipe_or_model), ""
    print(json.dumps(config.to_dict(recipe), indent=2) if options.json else about + flags.table(recipe))


def _info(options: Namespace) -> None:
    """Print versions, devices and which fast paths work here."""
    from maskset.info import info

    print(info())


def _add_model(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help='run folder, .safetensors file, "hub:owner/name", or nuclei (built in)')


def _add_data(parser: ArgumentParser) -> None:
    parser.add_argument("--data", required=True, help="data folder, COCO JSON file, or shapes: (generated)")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="image folder of a JSON file (default: beside it)")


def _add_max_detections(parser: ArgumentParser) -> None:
    help = "maximum number of objects per image (default: 100)"
    parser.add_argument("--max-detections", type=count, default=100, metavar="N", help=help)


def _add_device(parser: ArgumentParser) -> None:
    help = "device, such as cuda:1 (default: a GPU if there is one)"
    parser.add_argument("--device", type=usable_device, metavar="DEVICE", help=help)


def _add_masks(parser: ArgumentParser, split: str) -> None:
    parser.add_argument("--split", default=split, help=f"part of the data (default: {split})")
    parser.add_argument("--max-masks", type=count, default=20_000, metavar="N", help="number of masks to fit to (default: 20000)")
    parser.add_argument("--skip-broken", action="store_true", help="leave out broken annotations")


@dataclass(frozen=True)
class Command:
    """A command: its flags, its function, whose docstring is its help, and its place in `maskset --help`."""

    group: str
    add_flags: Callable[[ArgumentParser, Sequence[str]], None]
    call: Callable[[Namespace], None]
    memory_advice: str = "Close other programs, or use smaller inputs."

    @property
    def help(self) -> str:
        """The help of the command."""
        return self.call.__doc__ or ""


def _no_flags(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    pass


GROUPS = USE, TRAIN, MEASURE, DATA = "Use a model", "Train", "Measure", "Data and masks"
_LESS = "Lower --limit, use smaller images, or choose another --device."
_LESS_TRAINING = "Lower --train.batch-size, raise --train.accumulate, or set --train.checkpoint-activations true."
COMMANDS = {
    "predict": Command(USE, _predict_flags, _predict, _LESS),
    "show": Command(USE, _show_flags, _show),
    "convert": Command(USE, _convert_flags, _convert),
    "info": Command(USE, _no_flags, _info),
    "demo": Command(TRAIN, _demo_flags, _demo),
    "recipes": Command(TRAIN, _no_flags, _recipes),
    "train": Command(TRAIN, _train_flags, _train, _LESS_TRAINING),
    "evaluate": Command(MEASURE, _evaluate_flags, _evaluate, _LESS.replace("limit", "max-detections")),
    "compare": Command(MEASURE, _compare_flags, _compare, "Lower train.batch_size in the recipes, or raise train.accumulate."),
    "codecs fit": Command(DATA, _codecs_fit_flags, _codecs_fit, "Lower --max-masks or --size."),
    "codecs compare": Command(DATA, _codecs_compare_flags, _codecs_compare, "Lower --max-masks."),
}
