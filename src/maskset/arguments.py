"""Types of command-line arguments, and the settings that `maskset train --help` shows. Nothing slow is imported."""

from argparse import ArgumentTypeError
from collections.abc import Callable
from functools import partial
from pathlib import Path

from maskset.errors import ConfigError
from maskset.files import check_file, check_folder, check_new

# With the help that a test compares with the recipes', so that `maskset train --help` needs no recipe.
FIRST_SETTINGS = {
    "train.epochs": "passes over the training images",
    "train.batch_size": "images in one optimiser step, over all processes and accumulated parts",
    "train.accumulate": "parts into which a batch is split, to save memory",
    "train.learning_rate": "learning rate of everything but the backbone and the sampling offsets",
    "train.precision": "precision of the network; losses and matching are always in fp32",
    "train.ema_decay": "decay of the weight average that is evaluated and saved; 0 disables it",
    "train.evaluate_every": "epochs between evaluations; 0 evaluates only at the end",
    "train.seed": "random seed of initialisation, dropout, order and augmentation",
    "data.augmentation": (
        "detr: flip, resize, crop; mmdet: detr without the first resize; flip: no crop; lsj: scale jitter; none: unchanged"
    ),
    "data.workers": "processes that read images; results do not depend on it",
}


def _writable(check: Callable[[Path], None]) -> Callable[[str], Path]:
    """Return an argument type: a path that `check` accepts, so that a mistake is reported before the work."""

    def path(name: str) -> Path:
        try:
            check(Path(name))
        except ConfigError as error:
            raise ArgumentTypeError(str(error)) from None
        return Path(name)

    return path


new_file, new_folder = _writable(check_file), _writable(check_folder)
new_json = _writable(partial(check_new, ending=".json"))


def usable_device(name: str) -> str:
    """Return the name of a device that this machine can compute on."""
    from maskset.tensors import check_device

    try:
        check_device(name)
    except ConfigError as error:
        raise ArgumentTypeError(str(error)) from None
    return name


def count(text: str) -> int:
    """Return a number of things: whole, at least 1, and not too large for tensors."""
    if not text.isdecimal() or not 1 <= int(text) < 2**31:
        raise ArgumentTypeError(f"must be a whole number, at least 1 and below 2^31, got {text}")
    return int(text)
