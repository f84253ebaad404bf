"""Conversion of official checkpoints: every entry is used or a copy of another, and no code in a file runs."""

import dataclasses
import difflib
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from maskset import recipes
from maskset.checkpoint import save
from maskset.conversion import deformable_detr
from maskset.conversion.class_names import NAMES, read_class_names, used_categories
from maskset.conversion.deformable_detr import Initialization
from maskset.conversion.reading import OfficialWeights, read_state_dict, read_weights, unwrap
from maskset.errors import ConversionError
from maskset.files import check_new
from maskset.instances import Category
from maskset.recipe import Recipe
from maskset.systems import CONFIGS, SystemConfig, build

Converted = TypeVar("Converted")


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


def convert(system: str, state_dict: Mapping[str, Tensor], use_last_copy: bool = False) -> tuple[SystemConfig, dict[str, Tensor]]:
    """Return the settings and the converted state dict of official weights; `build(config)` loads it strictly.

    Args:
        system: "solq", "soit", "isda", "istr", "istr-smt" or "sotr".
        state_dict: official names and tensors. Prefixes such as "module." are removed.
        use_last_copy: where copies of one tensor differ, use the last, as official loading does.

    Raises:
        ConversionError: the system is unknown, an entry is unknown or missing, or copies differ.
    """
    converter = _converter(system)
    if not isinstance(state_dict, Mapping):
        raise ConversionError(
            f"convert takes the state dict of official weights, got {type(state_dict).__name__}: read_state_dict(path) of "
            "maskset.conversion reads a .pth file, and convert_file converts it."
        )
    return _apply(converter.convert, unwrap(dict(state_dict)), use_last_copy)


def convert_file(
    system: str,
    source: str | Path,
    out: str | Path,
    *,
    coco80: bool = False,
    classes: str | Path | None = None,
    use_last_copy: bool = False,
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
        use_last_copy: where copies of one tensor differ, use the last, as official loading does.
        license: of the weights, recorded in the file.

    Raises:
        ConversionError: the file is not a checkpoint of that system, holds objects that are not read for safety, or does not
            have as many class channels as `classes` has names.
        ConfigError: `out` exists already, or cannot be written.
    """
    converter, source, out = _converter(system), Path(source), Path(out)
    check_new(out, ".safetensors")
    weights = read_weights(source)
    config, state = _apply(converter.convert, weights, use_last_copy, source)
    if coco80 and config.num_classes != 91:
        raise ConversionError(f"coco80 needs the 91 class channels of COCO's raw ids, {source} has {config.num_classes}.")
    if coco80 and classes is not None:
        raise ConversionError("coco80 keeps COCO's classes and their names: leave out the file of class names, or coco80.")
    categories = converter.categories(config.num_classes)
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


def initialize_file(
    system: str,
    source: str | Path,
    out: str | Path,
    *,
    classes: str | Path | None = None,
    use_last_copy: bool = False,
    license: str = "unknown",
) -> Initialization:
    """Write a checkpoint to start training from, with the weights of mmdetection's plain Deformable DETR that fit a system.

    Args:
        system: the system, built as its ResNet-50 recipe says.
        source: mmdetection's .pth file.
        out: the .safetensors file to write, for `maskset train --init`.
        classes: a text file with the name of each class channel, one per line, see `convert_file`.
        use_last_copy: where copies of one tensor differ, use the last, as official loading does.
        license: of the weights, recorded in the file.

    Raises:
        ConversionError: the file is not such a checkpoint, or holds objects that are not read for safety.
    """
    _converter(system)
    source, out = Path(source), Path(out)
    check_new(out, ".safetensors")
    recipe = recipes.get(f"{system}-r50")
    weights = read_weights(source)

    def initialize(state: dict[str, Tensor], use_last_copy: bool) -> Initialization:
        return deformable_detr.initialize(recipe.model, state, use_last_copy)

    result = _apply(initialize, weights, use_last_copy, source)
    if classes is not None:
        result.model.categories = read_class_names(classes, len(result.model.categories))
    about = f"{len(result.copied)} tensors of the Deformable DETR checkpoint {_fingerprint(source)}, {weights}"
    save(result.model, recipe, out, source=about, license=license)
    return result


def _apply(
    convert: Callable[[dict[str, Tensor], bool], Converted],
    weights: OfficialWeights,
    use_last_copy: bool,
    source: Path | None = None,
) -> Converted:
    """Return the conversion of weights; errors name the file and the entries that are not used."""
    try:
        return convert(weights.state, use_last_copy)
    except ConversionError as error:
        if source is None and not weights.unused:
            raise
        raise ConversionError(f"{'' if source is None else f'{source}, '}{weights}: {error}") from None


def _nearest_recipe(config: SystemConfig) -> Recipe:
    """Return the recipe of the system whose model has most settings in common with a config, with that config."""
    same_system = [recipe for make in recipes.RECIPES.values() if (recipe := make()).model.system == config.system]
    nearest = max(same_system, key=lambda recipe: len(vars(recipe.model).items() & vars(config).items()))
    return dataclasses.replace(nearest, model=config)


def _select_classes(state: Mapping[str, Tensor], channels: list[int]) -> dict[str, Tensor]:
    """Return our state dict with only the given class channels; of the proposals' channels only the first is used."""
    rows = {"class_head": channels, "proposal_class_head": list(range(len(channels)))}
    rows_of = {name: rows.get(name.split(".")[0].removesuffix("s")) for name in state}
    return {name: value if (index := rows_of[name]) is None else value[index] for name, value in state.items()}


def _fingerprint(source: Path) -> str:
    with source.open("rb") as file:
        return f"{source.name}, sha256 {hashlib.file_digest(file, 'sha256').hexdigest()}"


def _converter(system: Any) -> Any:
    """Return the module that converts a system and is named like it. A system without official weights has none."""
    modules = {name: f"maskset.conversion.{name.replace('-', '_')}" for name in CONFIGS}
    convertible = [name for name, module in modules.items() if find_spec(module)]
    if not isinstance(system, str) or system not in convertible:
        if isinstance(system, str) and system in CONFIGS:
            raise ConversionError(f"{system} has no official weights, so there is nothing to convert.")
        near = difflib.get_close_matches(str(system), convertible, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ": the system comes first, then the weights."
        raise ConversionError(f"the system must be one of {', '.join(convertible)}, got {system!r:.80}{hint}")
    return import_module(modules[system])


__all__ = ["Conversion", "ConversionError", "convert", "convert_file", "initialize_file", "read_state_dict"]
