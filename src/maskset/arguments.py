"""Types of command-line arguments, and the settings that `maskset train --help` shows. No slow imports."""

from argparse import ArgumentTypeError
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from maskset.errors import ConfigError
from maskset.files import check_file, check_folder, check_new

# Value and short help of the settings that matter first: `maskset train --help` shows them without loading the recipes.
FIRST_SETTINGS = {
    "train.epochs": ("N", "passes over the training images"),
    "train.batch_size": ("N", "images in one optimizer step"),
    "train.accumulate": ("N", "parts of a batch, to save memory"),
    "train.learning_rate": ("X", "except for the backbone"),
    "train.precision": ("fp32|bf16|fp16", "of the network"),
    "train.ema_decay": ("X", "of the weight average"),
    "train.evaluate_every": ("N", "epochs between evaluations"),
    "train.seed": ("N", "random seed"),
    "data.augmentation": ("NAME", "detr, mmdet, flip, lsj, none"),
    "data.workers": ("N", "processes that read images"),
}


def _checked(check: Callable[[Any], object], convert: Callable[[str], Any] = Path) -> Callable[[str], Any]:
    """Return an argument type for values that `check` accepts, so that a mistake is reported before the work."""

    def value(text: str) -> Any:
        try:
            check(convert(text))
        except ConfigError as error:
            raise ArgumentTypeError(str(error)) from None
        return convert(text)

    return value


def _check_device(name: str) -> None:
    from maskset.tensors import check_device  # imports torch

    check_device(name)


new_file, new_folder = _checked(check_file), _checked(check_folder)
new_json = _checked(partial(check_new, ending=".json"))
usable_device = _checked(_check_device, str)


def count(text: str) -> int:
    """Return a whole number that is at least 1 and not too large for tensors."""
    if not text.isdecimal() or not 1 <= int(text) < 2**31:
        raise ArgumentTypeError(f"must be a whole number, at least 1 and below 2^31, got {text}")
    return int(text)
