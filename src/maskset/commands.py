"""The commands, one per public function: what each takes, and its call. Parses, calls, prints; there is no logic here.

Nothing slow is imported before a command needs it, so that help and mistakes are answered at once.
"""

import json
import os
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from maskset.errors import ConfigError, MasksetError
from maskset.files import check_file, check_folder, check_new


def _demo_flags(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the run and the pictures (default: demo)")


def _demo(given: Namespace) -> None:
    """Train a small model on generated images, measure it on others and draw what it finds: 9 minutes on a CPU."""
    from maskset.demo import demo

    demo(given.out)


@contextmanager
def _before_training() -> Iterator[None]:
    """Let Ctrl-C say that nothing was written, as training itself does before its first step."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped before the first step: nothing was written.") from None


@_before_training()
def _train_flags(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    from maskset import flags, recipes

    first = arguments[0] if arguments and not arguments[0].startswith("-") else "solq-r50"  # without one: whose flags help shows
    settings = recipes.get(first)
    parser.set_defaults(settings=settings, settings_of=first)
    parser.usage = "%(prog)s RECIPE --data DATA [--images FOLDER] --out RUN [--init MODEL] [--resume] [--SETTING VALUE ...]"
    parser.add_argument("recipe", metavar="RECIPE", help="comes first: a name that `maskset recipes` lists, or a recipe.json")
    _add_data(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="folder that the run makes")
    parser.add_argument("--init", metavar="MODEL", help="start from these weights, whatever their classes and queries")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out where it stopped")
    flags.add(parser, settings)


def _train(given: Namespace) -> None:
    """Train a recipe on annotated images. Every setting of the recipe is a flag."""
    with _before_training():
        from maskset import flags
        from maskset.training.train import train

    if given.recipe != given.settings_of:  # else another recipe's settings would be trained under its name
        raise MasksetError(f"the recipe comes first: maskset train {given.recipe} --data ... --out ...")
    recipe = flags.changed(given.settings, vars(given))
    metrics = train(recipe, given.data, given.out, init=given.init, resume=given.resume, images=given.images)
    if os.environ.get("RANK", "0") == "0":  # of several processes, one speaks
        print(metrics)


def _evaluate_flags(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    _add_model(parser)
    _add_data(parser)
    parser.add_argument("--split", default="val", help="part of the data (default: val)")
    _add_max_detections(parser)
    parser.add_argument("--skip-broken", action="store_true", help="leave out broken images and annotations instead of stopping")
    _add_device(parser)
    parser.add_argument("--out", type=_new_folder, metavar="FOLDER", help="write metrics.json and per_class.csv here")


def _evaluate(given: Namespace) -> None:
    """Print the average precision of a model on annotated images, as COCO defines it."""
    from maskset.evaluation.evaluate import evaluate

    metrics = evaluate(
        given.model,
        given.data,
        split=given.split,
        max_detections=given.max_detections,
        images=given.images,
        skip_broken=given.skip_broken,
        device=given.device,
    )
    print(metrics)
    if given.out:
        print(f"\nwritten to {metrics.save(given.out)}")


def _predict_flags(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    _add_model(parser)
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help='image files, folders, or patterns such as "photos/*.jpg"')
    parser.add_argument("--out", type=_new_folder, default="found", metavar="FOLDER", help="where to write (default: found)")
    parser.add_argument("--threshold", type=float, default=0.5, help="least score of an object (default: 0.5)")
    parser.add_argument("--limit", type=int, default=100, metavar="N", help="objects per image at the most (default: 100)")
    parser.add_argument(
        "--save",
        nargs="*",
        choices=("drawings", "labels"),
        default=["drawings"],
        help="what to write beside results.json: drawings of the objects, label images (default: drawings)",
    )
    parser.add_argument("--skip-broken", action="store_true", help="leave out files that cannot be read instead of stopping")
    _add_device(parser)


def _predict(given: Namespace) -> None:
    """Find the objects in images; write them as COCO results, drawn pictures and label images."""
    from maskset.inference.predict import predict_files
    from maskset.instances.saving import save_predictions

    skip = given.skip_broken
    found = predict_files(
        given.model, given.sources, threshold=given.threshold, limit=given.limit, device=given.device, skip_broken=skip
    )
    save_predictions(found, given.out, drawings="drawings" in given.save, labels="labels" in given.save)
    print("written: " + ", ".join(str(given.out / name) for name in ["results.json", *given.save]))


def _compare_flags(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    several = "recipes (names or recipe.json files), which are trained, and models, which are only measured"
    parser.add_argument("models", nargs="+", metavar="RECIPE|MODEL", help=several)
    _add_data(parser)
    parser.add_argument("--out", type=_new_folder, required=True, metavar="FOLDER", help="of the comparison, which goes on there")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--epochs", type=int, metavar="N", help="of training for each recipe (default: the recipe's own)")
    budget.add_argument("--minutes", type=float, metavar="M", help="of training for each recipe, instead of epochs")
    parser.add_argument("--split", default="val", help="part of the data that is measured (default: val)")
    _add_max_detections(parser)
    parser.add_argument("--skip-broken", action="store_true", help="leave out broken images and annotations instead of stopping")


def _compare(given: Namespace) -> None:
    """Train recipes with the same budget, measure them and other models, and put them into one table and one figure."""
    with _before_training():
        from maskset.comparison.compare import compare

    comparison = compare(
        given.models,
        given.data,
        given.out,
        epochs=given.epochs,
        minutes=given.minutes,
        images=given.images,
        split=given.split,
        max_detections=given.max_detections,
        skip_broken=given.skip_broken,
    )
    print(f"\n{comparison}\n\nwritten to {given.out}")
    if comparison.failed:
        names = ", ".join(one.name for one in comparison.failed)
        raise MasksetError(f"failed: {names} (why is said above). The others are done; the same command tries again.")


def _codecs_fit_flags(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    parser.add_argument("kind", metavar="KIND", help="pca, sparse, logit-pca or autoencoder; the others need no fitting")
    parser.add_argument("data", metavar="DATA", help="a data folder, a COCO JSON file, or the word shapes")
    parser.add_argument("out", type=_new_file, metavar="OUT", help="the .safetensors file to write")
    parser.add_argument("--size", type=int, help="side of the box-local mask, pixels (default: 28, for autoencoder 112)")
    parser.add_argument("--length", type=int, help="numbers per mask (default: 60, for sparse and autoencoder 256)")
    parser.add_argument("--beta", type=float, help="sparse: weight of sparsity (default: 0.3 * size / 28)")
    parser.add_argument("--steps", type=int, metavar="N", help="autoencoder: batches of 64 masks (default: 3000, hours on a CPU)")
    _add_masks(parser, "train")


def _codecs_fit(given: Namespace) -> None:
    """Fit a mask codec to the masks of a data set."""
    from maskset.codec_tools.fit import fit_codec

    codec = fit_codec(
        given.kind,
        given.data,
        given.out,
        size=given.size,
        length=given.length,
        beta=given.beta,
        steps=given.steps,
        split=given.split,
        max_masks=given.max_masks,
        skip_broken=given.skip_broken,
    )
    print(f"written to {given.out}: {given.kind}, {codec.length} numbers for a mask of {codec.size} x {codec.size} pixels")


def _codecs_compare_flags(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    parser.add_argument("data", nargs="+", metavar="DATA", help="data folders, COCO JSON files, or the word shapes")
    parser.add_argument("--fit-split", default="train", metavar="SPLIT", help="part of the data to fit to (default: train)")
    parser.add_argument("--out", type=_new_json, metavar="FILE", help="write the table as JSON here")
    _add_masks(parser, "val")


def _codecs_compare(given: Namespace) -> None:
    """Print how well each mask codec reconstructs real masks: an upper bound for networks that use it."""
    from maskset.codec_tools.compare import compare_codecs

    comparison = compare_codecs(
        given.data, split=given.split, fit_split=given.fit_split, max_masks=given.max_masks, skip_broken=given.skip_broken
    )
    print(comparison)
    if given.out:
        print(f"\nwritten to {comparison.save(given.out)}")


def _convert_flags(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    parser.add_argument("system", metavar="SYSTEM", help="system of the checkpoint: solq, soit, isda, istr, istr-smt or sotr")
    parser.add_argument("source", type=Path, metavar="FILE", help="the official .pth file")
    parser.add_argument("out", type=_new_file, metavar="OUT", help="the .safetensors file to write")
    parser.add_argument("--coco80", action="store_true", help="keep the 80 classes of COCO only, not all 91 channels")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="text file with one class name per line")
    parser.add_argument("--last-wins", action="store_true", help="where copies of a tensor differ, take the last")
    parser.add_argument("--from", dest="start", choices=["deformable-detr"], help="FILE is mmdetection's: take from it what fits")
    parser.add_argument("--license", default="unknown", help="of the weights; recorded in the file (default: unknown)")


def _convert(given: Namespace) -> None:
    """Turn an official checkpoint into one of maskset's."""
    from maskset.conversion import convert_file, start_file

    settings = {"classes": given.classes, "last_wins": given.last_wins, "license": given.license}
    if given.start and given.coco80:
        raise MasksetError("--coco80 does not go with --from: mmdetection's Deformable DETR has 80 classes.")
    if given.start:
        print(start_file(given.system, given.source, given.out, **settings))
    else:
        print(convert_file(given.system, given.source, given.out, coco80=given.coco80, **settings))
    print(f"written to {given.out}")


def _recipes(given: Namespace) -> None:
    """List the recipes, with what each is for."""
    from maskset.recipes import RECIPES

    width = max(map(len, RECIPES)) + 2
    for name, recipe in RECIPES.items():
        print(f"{name:{width}}{(recipe.__doc__ or '').splitlines()[0]}")


def _show_flags(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    parser.add_argument("what", metavar="RECIPE|MODEL", help="a recipe's name, a recipe.json, a checkpoint or a run folder")
    parser.add_argument("--json", action="store_true", help="print a recipe.json, to change and to give to `maskset train`")


def _show(given: Namespace) -> None:
    """Print every setting of a recipe, or of a model with its classes, its source and its license."""
    from maskset import checkpoint, config, flags, recipes

    if checkpoint.is_model(given.what) and not recipes.known(given.what):
        metadata = checkpoint.read_metadata(checkpoint.find(given.what))
        recipe, names = metadata.recipe, ", ".join(category.name for category in metadata.categories)
        about = f"classes: {names}\nsource: {metadata.source or 'trained here'}\nlicense: {metadata.license}\n\n"
    else:
        recipe, about = recipes.get(given.what), ""
    print(json.dumps(config.to_dict(recipe), indent=2) if given.json else about + flags.table(recipe))


def _info(given: Namespace) -> None:
    """Print versions, devices and which fast paths work on this machine, for bug reports."""
    from maskset.info import info

    print(info())


def _add_model(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a run folder or a checkpoint file (.safetensors)")


def _add_data(parser: ArgumentParser) -> None:
    parser.add_argument("--data", required=True, help="a data folder, a COCO JSON file (with --images), or the word shapes")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="where the images of a JSON file are")


def _add_max_detections(parser: ArgumentParser) -> None:
    help = "objects per image that count (default: 100)"
    parser.add_argument("--max-detections", type=int, default=100, metavar="N", help=help)


def _add_device(parser: ArgumentParser) -> None:
    help = "where to compute, such as cuda:1 (default: a GPU if there is one)"
    parser.add_argument("--device", type=_usable_device, metavar="DEVICE", help=help)


def _writable(check: Callable[[Path], None]) -> Callable[[str], Path]:
    """Return the type of an argument: a path where `check` finds that something can be written, told before the work."""

    def path(name: str) -> Path:
        try:
            check(Path(name))
        except ConfigError as error:
            raise ArgumentTypeError(str(error)) from None
        return Path(name)

    return path


_new_file, _new_folder = _writable(check_file), _writable(check_folder)
_new_json = _writable(partial(check_new, ending=".json"))


def _usable_device(name: str) -> str:
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ArgumentTypeError(f"{name} cannot be used: {str(error).splitlines()[0]}") from None
    return name


def _add_masks(parser: ArgumentParser, split: str) -> None:
    parser.add_argument("--split", default=split, help=f"part of the data (default: {split})")
    parser.add_argument("--max-masks", type=int, default=20_000, metavar="N", help="number of masks to fit to (default: 20000)")
    parser.add_argument("--skip-broken", action="store_true", help="leave out broken annotations instead of stopping")


@dataclass(frozen=True)
class Command:
    """What a command takes, and what it does; its help is the docstring of that."""

    flags: Callable[[ArgumentParser, Sequence[str]], None]
    call: Callable[[Namespace], None]

    @property
    def help(self) -> str:
        """What `--help` says of it."""
        return self.call.__doc__ or ""


COMMANDS = {
    "demo": Command(_demo_flags, _demo),
    "train": Command(_train_flags, _train),
    "evaluate": Command(_evaluate_flags, _evaluate),
    "predict": Command(_predict_flags, _predict),
    "compare": Command(_compare_flags, _compare),
    "codecs fit": Command(_codecs_fit_flags, _codecs_fit),
    "codecs compare": Command(_codecs_compare_flags, _codecs_compare),
    "convert": Command(_convert_flags, _convert),
    "recipes": Command(lambda parser, arguments: None, _recipes),
    "show": Command(_show_flags, _show),
    "info": Command(lambda parser, arguments: None, _info),
}
