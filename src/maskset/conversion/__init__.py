"""Official checkpoints become ours: every entry used or named as an alias, nothing guessed, nothing unpickled."""

import argparse
import dataclasses
import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskset.conversion import deformable_detr, isda, istr, istr_smt, soit, solq, sotr
from maskset.conversion.coco import NAMES, used_categories
from maskset.errors import ConversionError
from maskset.files import check_new
from maskset.systems import Config

_CONVERTERS = {"solq": solq, "soit": soit, "isda": isda, "istr": istr, "istr-smt": istr_smt, "sotr": sotr}


def convert(system: str, state_dict: Mapping[str, Tensor], last_wins: bool = False) -> tuple[Config, dict[str, Tensor]]:
    """Return the config and state dict that an official state dict becomes; `build(config)` loads it strictly.

    Args:
        system: "solq", "soit", "isda", "istr", "istr-smt" or "sotr".
        state_dict: official names and tensors.
        last_wins: where copies of one tensor differ, take the last, as official loading does.

    Raises:
        ConversionError: the system is unknown, an entry is unknown or missing, or copies differ.
    """
    return _converter(system).convert(state_dict, last_wins)


def convert_file(
    system: str, source: Path, out: Path, *, coco80: bool = False, last_wins: bool = False, license: str = "unknown"
) -> Path:
    """Write an official checkpoint file as one of ours and return its path.

    Args:
        system: "solq", "soit", "isda", "istr", "istr-smt" or "sotr".
        source: the official .pth file.
        out: the .safetensors file to write.
        coco80: keep only the 80 class channels that COCO uses, not all raw category ids 0 ... 90.
        last_wins: where copies of one tensor differ, take the last, as official loading does.
        license: of the weights, recorded in the file.

    Raises:
        ConversionError: the file is no checkpoint of that system, or holds objects that are not read for safety.
        ConfigError: `out` is there already, or cannot be written.
    """
    from maskset import recipes
    from maskset.checkpoint import save
    from maskset.systems import build

    check_new(out, ".safetensors")
    config, state = convert(system, read(source), last_wins)
    categories = _converter(system).categories(config.num_classes)
    if coco80:
        if config.num_classes != 91:
            raise ConversionError(f"coco80 needs the 91 class channels of COCO's raw ids, the file has {config.num_classes}.")
        state = _select_classes(state, list(NAMES))
        config = dataclasses.replace(config, num_classes=len(NAMES))
        categories = used_categories()
    model = build(config, categories)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ConversionError(f"{source} does not fit the model that its shapes describe: {error}") from None
    known = [recipe for make in recipes.RECIPES.values() if (recipe := make()).model.system == config.system]
    nearest = max(known, key=lambda recipe: len(vars(recipe.model).items() & vars(config).items()))
    recipe = dataclasses.replace(nearest, model=config)
    save(model, recipe, out, source=f"official {system} checkpoint {_named(source)}", license=license)
    return out


def start_file(
    system: str, source: Path, out: Path, *, last_wins: bool = False, license: str = "unknown"
) -> deformable_detr.Start:
    """Write what a system takes from mmdetection's plain Deformable DETR as a checkpoint to start from, and return it.

    Args:
        system: whose ResNet-50 recipe says what the model is like.
        source: mmdetection's .pth file.
        out: the .safetensors file to write, for `maskset train --init`.
        last_wins: where copies of one tensor differ, take the last, as official loading does.
        license: of the weights, recorded in the file.

    Raises:
        ConversionError: the file is no such checkpoint, or holds objects that are not read for safety.
    """
    from maskset import recipes
    from maskset.checkpoint import save

    _converter(system)
    check_new(out, ".safetensors")
    recipe = recipes.get(f"{system}-r50")
    start = deformable_detr.start(recipe.model, read(source), last_wins)
    about = f"start of {len(start.taken)} tensors from the Deformable DETR checkpoint {_named(source)}"
    save(start.model, recipe, out, source=about, license=license)
    return start


def read(source: Path) -> dict[str, Tensor]:
    """Return the state dict in a .pth file, reading only tensors, plain containers and argparse's namespace.

    Raises:
        ConversionError: the file is missing, no PyTorch file, holds anything else, or holds no state dict.
    """
    if not source.is_file():
        raise ConversionError(f"{source} is a folder: name the .pth file." if source.is_dir() else f"{source} does not exist.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):
            content: Any = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types here, all of which mean: not a file that we read
        reason = str(error).strip().split("\n")[0].split(". ")[0]
        raise ConversionError(
            f"{source} cannot be read safely as a PyTorch checkpoint ({type(error).__name__}: {reason}). Only tensors and plain "
            "settings are read, never code."
        ) from None
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise ConversionError(f"{source} holds no state dict (a dict of tensors, or one under 'model' or 'state_dict').")
    return {str(name).removeprefix("module."): value for name, value in content.items()}


def _select_classes(state: Mapping[str, Tensor], channels: list[int]) -> dict[str, Tensor]:
    """Return our state dict with only the given class channels; the proposals' one channel that counts is the first."""
    rows = {"class_head": channels, "proposal_class_head": list(range(len(channels)))}
    kept = {name: rows.get(name.split(".")[0].removesuffix("s")) for name in state}
    return {name: value if (index := kept[name]) is None else value[index] for name, value in state.items()}


def _named(source: Path) -> str:
    return f"{source.name}, sha256 {hashlib.sha256(source.read_bytes()).hexdigest()}"


def _converter(system: str) -> Any:
    if system not in _CONVERTERS:
        raise ConversionError(f"there is no converter for {system!r}; there is one for {', '.join(_CONVERTERS)}.")
    return _CONVERTERS[system]


__all__ = ["ConversionError", "convert", "convert_file", "read", "start_file"]
