"""A checkpoint is one self-contained .safetensors file: weights, recipe, categories and source.

Nothing is ever unpickled: a file that could run code is refused.
"""

import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskset import recipes
from maskset.config import from_dict, to_dict
from maskset.errors import CheckpointError, ConfigError
from maskset.files import atomic_write
from maskset.instances import Category
from maskset.recipe import Recipe
from maskset.systems import System, build

FORMAT = 2  # increases with every change that older versions of maskset cannot read
HUB_FILE = "model.safetensors"  # name of the checkpoint in a repository on the hub
_FLOATS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_INTEGERS = {torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}
_DTYPES = _FLOATS | _INTEGERS  # names of types in safetensors files
BUNDLED = Path(__file__).parent / "models"
_RUN_FILES = ("best.safetensors", "last.safetensors")  # the checkpoints of a run folder, the preferred one first


@dataclass(frozen=True)
class Metadata:
    """The metadata of a checkpoint.

    Attributes:
        recipe: the settings of the training; `recipe.model` builds the network of the weights.
        categories: what the class channels stand for.
        source: the origin of the weights, such as the name and SHA-256 of a converted file.
        license: SPDX identifier or name of the license of the weights.
    """

    recipe: Recipe
    categories: tuple[Category, ...]
    source: str | None
    license: str


def save(model: System, recipe: Recipe, path: str | Path, *, source: str | None = None, license: str = "unknown") -> None:
    """Write the model as a checkpoint. The file is replaced atomically.

    Args:
        model: its weights, its fitted codec, its config and its categories are written.
        recipe: the settings of its training.
        path: the file; its name should end in .safetensors.
        source: the origin of the weights.
        license: SPDX identifier or name of the license of the weights.
    """
    metadata = {
        "format": f"maskset {FORMAT}",
        "recipe": json.dumps(to_dict(replace(recipe, model=model.config))),
        "categories": json.dumps([asdict(category) for category in model.categories]),
        "license": license,
        **({} if source is None else {"source": source}),
    }
    write_tensors(model.state_dict(), Path(path), metadata)


def load(source: str | Path) -> System:
    """Return a trained model, on the CPU and ready to predict.

    Args:
        source: a run folder (its best weights, else its last), a .safetensors file, "hub:owner/name", or a model in the package:
            "nuclei".

    Raises:
        CheckpointError: there is no such file, or it is not a checkpoint.
    """
    path = find(source)
    metadata, weights = read(path)
    model = build(metadata.recipe.model, metadata.categories)
    check_weights(weights, model, path)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: the weights do not fit the model that the file describes. {reason[:400]}") from None
    return model.eval()


def find(source: str | Path) -> Path:
    """Return the checkpoint file of a run folder, a path, "hub:owner/name", or the name of a model in the package.

    A run folder or file comes before a model in the package with the same name.

    Raises:
        CheckpointError: there is none.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise CheckpointError(f'a model is named by a run folder, a .safetensors file or "hub:owner/name", got {source!r:.80}.')
    if isinstance(source, str) and source.startswith("hub:"):
        return _download(source.removeprefix("hub:"))
    path = Path(source)
    checkpoints = [path / name for name in _RUN_FILES if (path / name).is_file()]
    if checkpoints:
        return checkpoints[0]
    if path.is_file():
        return path
    bundled = bundled_models().get(str(source))
    if bundled is not None:
        return bundled
    if path.is_dir():
        raise CheckpointError(
            f"the folder {path} does not contain {' or '.join(_RUN_FILES)}: "
            "it is not a run folder, or the run has not saved a checkpoint."
        )
    raise CheckpointError(f"there is no checkpoint {path}.{_hint(source, path)}")


def bundled_models() -> dict[str, Path]:
    """Return the models in the package, by name."""
    return {path.stem: path for path in sorted(BUNDLED.glob("*.safetensors"))}


def is_model(source: str) -> bool:
    """Return whether a text names a model for `find`: a hub name, a .safetensors file, a folder or a model in the package."""
    return source.startswith("hub:") or source.endswith(".safetensors") or Path(source).is_dir() or source in bundled_models()


def read_metadata(path: str | Path) -> Metadata:
    """Return the metadata of a checkpoint file, without reading the weights.

    Raises:
        CheckpointError: the file is not a checkpoint.
    """
    with open_safetensors(Path(path)) as file:
        return _metadata(file.metadata() or {}, Path(path))


def read(path: str | Path) -> tuple[Metadata, dict[str, Tensor]]:
    """Return the metadata of a checkpoint file, and its weights by name, on the CPU.

    Raises:
        CheckpointError: the file is not a checkpoint.
    """
    with open_safetensors(Path(path)) as file:
        return _metadata(file.metadata() or {}, Path(path)), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def check_weights(weights: Mapping[str, Tensor], model: System, path: Path) -> None:
    """Refuse weights of a type that the model's tensor of that name cannot have, and weights that are NaN or infinite.

    Raises:
        CheckpointError: there are such weights; the message names the first.
    """
    for name, own in model.state_dict().items():
        if name not in weights:
            continue
        dtype, expected = weights[name].dtype, own.dtype
        if dtype != expected and not (dtype in _FLOATS and expected in _FLOATS):
            raise CheckpointError(f"{path}: {name} is {dtype}, it must be {expected}: the file is damaged.")
        if dtype in _FLOATS and not torch.isfinite(weights[name]).all():
            raise CheckpointError(f"{path}: {name} has NaN or infinite values. Use an earlier checkpoint of the training.")


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file and yield its reader.

    Raises:
        CheckpointError: it is not a safetensors file, or is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(_why_unreadable(path, str(error))) from None


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write tensors and texts as a safetensors file. The file is replaced atomically.

    Equal content gives equal files, unlike with `safetensors.torch.save_file`, which writes metadata in random order.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    ordered = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # aligns each to the size of its type
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in ordered:
        start, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": _DTYPES[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as part, part.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in ordered:
            file.write(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _metadata(texts: dict[str, str], path: Path) -> Metadata:
    name, _, version = texts.get("format", "").partition(" ")
    if name != "maskset" or not version.isdigit():
        raise CheckpointError(
            f"{path} contains tensors but is not a maskset checkpoint: convert official weights with 'maskset convert'."
        )
    if int(version) > FORMAT:
        raise CheckpointError(
            f"{path} was written by a newer maskset (format {version}, this one reads up to {FORMAT}): upgrade maskset."
        )
    if int(version) < FORMAT:
        raise CheckpointError(
            f"{path} was written before the first release of maskset (format {version}, this version reads {FORMAT}): "
            "train or convert again."
        )
    try:
        recipe = from_dict(Recipe, json.loads(texts["recipe"]), f"{path}: recipe")
        categories = tuple(Category(row["name"], row["coco_id"]) for row in json.loads(texts["categories"]))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: the metadata is damaged ({error}).") from None
    if len(categories) != recipe.model.num_classes:
        raise CheckpointError(f"{path} names {len(categories)} categories but has {recipe.model.num_classes} class channels.")
    return Metadata(recipe, categories, texts.get("source"), texts.get("license", "unknown"))


def _why_unreadable(path: Path, reason: str) -> str:
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}."
    if start[:2] == b"PK" or start[:1] == b"\x80":  # torch.save's zip archive, and a bare pickle
        return (
            f"{path} is a PyTorch pickle, which could run code and is never loaded. "
            f"Convert an official .pth checkpoint: maskset convert SYSTEM {path} OUT.safetensors"
        )
    return (
        f"{path} is not a safetensors file, or is damaged or cut short ({reason}): "
        "name a run folder, or a checkpoint that maskset wrote."
    )


def _hint(source: str | Path, path: Path) -> str:
    """Return a suggestion for a path that does not exist."""
    if recipes.known(source):
        system = recipes.get(source).model.system
        return (
            f" It is a recipe: train it with 'maskset train {source} --data DATA --out RUN' and name RUN, or convert official "
            f"weights with 'maskset convert {system} FILE OUT.safetensors' and name OUT.safetensors."
        )
    models = {name: name for name in bundled_models()} | {
        name: str(path.parent / name) for name in (os.listdir(path.parent) if path.parent.is_dir() else [])
    }
    near = difflib.get_close_matches(path.name, models, n=1)
    if near:
        return f" Did you mean {models[near[0]]}?"
    return f" For a model on the hub write hub:{source}." if str(source).count("/") == 1 and not path.suffix else ""


def _download(name: str) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise CheckpointError(f"a model on the hub is hub:owner/name, got hub:{name}.")
    try:
        if not HfApi().file_exists(name, HUB_FILE):
            raise CheckpointError(f"the hub has no repository {name} with a file {HUB_FILE} that you may read.")
        return Path(hf_hub_download(name, HUB_FILE))
    except CheckpointError:
        raise
    except Exception as error:  # its type depends on the HTTP library that the hub's client uses
        cached = try_to_load_from_cache(name, HUB_FILE)
        if isinstance(cached, str):
            return Path(cached)
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"hub:{name} is not in the cache, and the hub cannot be reached ({reason}).") from None
