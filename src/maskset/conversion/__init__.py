"""Conversion of official checkpoints: every entry is used or named as an alias, and nothing is unpickled."""

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from maskset import recipes
from maskset.checkpoint import save
from maskset.conversion import deformable_detr, isda, istr, istr_smt, soit, solq, sotr
from maskset.conversion.class_names import read_class_names
from maskset.conversion.coco import NAMES, used_categories
from maskset.conversion.reading import OfficialWeights, read_state_dict, read_weights, unwrap
from maskset.errors import ConversionError
from maskset.files import check_new
from maskset.instances import Category
from maskset.systems import SystemConfig, build

_CONVERTERS = {"solq": solq, "soit": soit, "isda": isda, "istr": istr, "istr-smt": istr_smt, "sotr": sotr}


@dataclass(frozen=True)
class Conversion:
    """A converted checkpoint.

    Attributes:
        file: the .safetensors file.
        weights: the official weights, with their place in the official file.
        categories: what the class channels stand for.
    """

    file: Path
    weights: OfficialWeights
    categories: tuple[Category, ...]

    def __str__(self) -> str:
        names = ", ".join(category.name for category in self.categories[:5]) + (", ..." if len(self.categories) > 5 else "")
        return f"converted {self.weights}\n{len(self.categories)} classes: {names}"


def convert(system: str, state_dict: Mapping[str, Tensor], last_wins: bool = False) -> tuple[SystemConfig, dict[str, Tensor]]:
    """Return the config and the converted state dict of official weights; `build(config)` loads it strictly.

    Args:
        system: "solq", "soit", "isda", "istr", "istr-smt" or "sotr".
        state_dict: official names and tensors. Prefixes such as "module." are removed.
        last_wins: where copies of one tensor differ, take the last, as official loading does.

    Raises:
        ConversionError: the system is unknown, an entry is unknown or missing, or copies differ.
    """
    return _converter(system).convert(unwrap(dict(state_dict)).state, last_wins)


def convert_file(
    system: str,
    source: Path,
    out: Path,
    *,
    coco80: bool = False,
    classes: Path | None = None,
    last_wins: bool = False,
    license: str = "unknown",
) -> Conversion:
    """Convert an official checkpoint file to maskset's format.

    Args:
        system: "solq", "soit", "isda", "istr", "istr-smt" or "sotr".
        source: the official .pth file.
        out: the .safetensors file to write.
        coco80: keep only the 80 class channels that COCO uses, not all raw category ids 0 ... 90.
        classes: a text file with the name of each class channel, one per line. By default a checkpoint with COCO's number of
            channels has COCO's names, any other "class 0" and so on.
        last_wins: where copies of one tensor differ, take the last, as official loading does.
        license: of the weights, recorded in the file.

    Raises:
        ConversionError: the file is not a checkpoint of that system, holds objects that are not read for safety, or does not
            have as many class channels as `classes` has names.
        ConfigError: `out` exists already, or cannot be written.
    """
    check_new(out, ".safetensors")
    weights = read_weights(source)
    config, state = _converter(system).convert(weights.state, last_wins)
    if coco80 and config.num_classes != 91:
        raise ConversionError(f"coco80 needs the 91 class channels of COCO's raw ids, the file has {config.num_classes}.")
    if coco80 and classes is not None:
        raise ConversionError("coco80 keeps COCO's classes and their names: leave out the file of class names, or coco80.")
    categories = _converter(system).categories(config.num_classes)
    if classes is not None:
        categories = read_class_names(classes, config.num_classes)
    if coco80:
        state = _select_classes(state, list(NAMES))
        config = dataclasses.replace(config, num_classes=len(NAMES))
        categories = used_categories()
    model = build(config, categories)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ConversionError(f"{source} does not fit the model that its shapes describe: {error}") from None
    about = f"official {system} checkpoint {_fingerprint(source)}, {weights}"
    save(model, _nearest_recipe(config), out, source=about, license=license)
    return Conversion(out, weights, categories)


def start_file(
    system: str,
    source: Path,
    out: Path,
    *,
    classes: Path | None = None,
    last_wins: bool = False,
    license: str = "unknown",
) -> deformable_detr.Start:
    """Write what a system takes from mmdetection's plain Deformable DETR as a checkpoint to start from, and return it.

    Args:
        system: the system to start, built as its ResNet-50 recipe says.
        source: mmdetection's .pth file.
        out: the .safetensors file to write, for `maskset train --init`.
        classes: a text file with the name of each class channel, one per line, see `convert_file`.
        last_wins: where copies of one tensor differ, take the last, as official loading does.
        license: of the weights, recorded in the file.

    Raises:
        ConversionError: the file is not such a checkpoint, or holds objects that are not read for safety.
    """
    _converter(system)
    check_new(out, ".safetensors")
    recipe = recipes.get(f"{system}-r50")
    weights = read_weights(source)
    start = deformable_detr.start(recipe.model, weights.state, last_wins)
    if classes is not None:
        start.model.categories = read_class_names(classes, len(start.model.categories))
    about = f"start of {len(start.copied)} tensors from the Deformable DETR checkpoint {_fingerprint(source)}, {weights}"
    save(start.model, recipe, out, source=about, license=license)
    return start


def _nearest_recipe(config: Any) -> Any:
    """Return the recipe of the system whose model has most settings in common with a config, with that config."""
    known = [recipe for make in recipes.RECIPES.values() if (recipe := make()).model.system == config.system]
    nearest = max(known, key=lambda recipe: len(vars(recipe.model).items() & vars(config).items()))
    return dataclasses.replace(nearest, model=config)


def _select_classes(state: Mapping[str, Tensor], channels: list[int]) -> dict[str, Tensor]:
    """Return our state dict with only the given class channels; the proposals' one channel that counts is the first."""
    rows = {"class_head": channels, "proposal_class_head": list(range(len(channels)))}
    rows_of = {name: rows.get(name.split(".")[0].removesuffix("s")) for name in state}
    return {name: value if (index := rows_of[name]) is None else value[index] for name, value in state.items()}


def _fingerprint(source: Path) -> str:
    with source.open("rb") as file:
        return f"{source.name}, sha256 {hashlib.file_digest(file, 'sha256').hexdigest()}"


def _converter(system: str) -> Any:
    if system not in _CONVERTERS:
        raise ConversionError(f"there is no converter for {system!r}; there is one for {', '.join(_CONVERTERS)}.")
    return _CONVERTERS[system]


__all__ = ["Conversion", "ConversionError", "convert", "convert_file", "read_state_dict", "start_file"]
