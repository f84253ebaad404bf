"""Read an official checkpoint file without running any code in it, and find the weights among its other content."""

import argparse
import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

from maskset import recipes
from maskset.errors import ConversionError
from maskset.messages import first_names

# Names that contain the weights, as the key of a dict or as a prefix of names, in order of preference: averaged weights first.
WRAPPERS = ("model_ema", "ema_model", "state_dict_ema", "ema_state_dict", "ema", "model", "state_dict", "module", "_orig_mod")
_MAX_DEPTH = 8  # of nested dicts that are searched; a dict may contain itself


@dataclass(frozen=True)
class OfficialWeights:
    """A state dict and its place in the file.

    Attributes:
        state: official names and tensors.
        path: the wrappers around it, outermost first, such as ("ema", "module").
        unused: the entries of the file outside of it, such as "model", "optimizer" and "epoch".
    """

    state: dict[str, Tensor]
    path: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    def __str__(self) -> str:
        kind = "averaged weights" if any("ema" in name for name in self.path) else "weights"
        where = f"{kind} of {'.'.join(self.path)!r}" if self.path else "the weights"
        return where + (f" (not used: {', '.join(self.unused)})" if self.unused else "")


def read_weights(source: str | Path) -> OfficialWeights:
    """Return the weights in a .pth file. Averaged weights are preferred.

    Only tensors, plain containers, NumPy numbers and arrays, paths, and the settings objects of common libraries are read, by
    torch's `weights_only`. Nothing that the file names is imported or called: settings objects become empty placeholders.

    Raises:
        ConversionError: the file is missing, is not a PyTorch file, holds another kind of object, or holds no state dict.
    """
    source = Path(source)
    if source.is_dir():
        raise ConversionError(f"{source} is a folder: name the .pth file.")
    if not source.is_file():
        hint = " It is the name of a recipe: name an official .pth file." if recipes.known(source) else ""
        raise ConversionError(f"{source} {'is not a regular file' if source.exists() else 'does not exist'}.{hint}")
    content = _load(source)
    weights = unwrap(content, str(source))
    if not weights.state:
        raise ConversionError(f"{source} does not contain a state dict: it has no tensors.")
    return weights


def read_state_dict(source: str | Path) -> dict[str, Tensor]:
    """Return the state dict in a .pth file, see `read_weights`."""
    return read_weights(source).state


def unwrap(content: Any, source: str = "the checkpoint") -> OfficialWeights:
    """Return the weights inside a checkpoint's content.

    `{"ema": {"module": {...}}, "model": {...}}`, names that start with "module." (DistributedDataParallel), "_orig_mod."
    (torch.compile) or "model." (Lightning) are all wrappers; averaged weights are preferred.

    Args:
        content: what the file contains.
        source: name of the checkpoint, for errors.

    Raises:
        ConversionError: there are dicts with tensors, but under other names.
    """
    path: list[str] = []
    unused: list[str] = []
    content = _named(content)
    for _ in range(_MAX_DEPTH):
        groups = _groups(content)
        wrapper = next((name for name in WRAPPERS if name in groups and _has_tensors(groups[name])), None)
        if wrapper is None:
            break
        unused += [".".join([*path, name]) for name in dict.fromkeys(map(_first, content)) if name != wrapper]
        path.append(wrapper)
        content = _named(groups[wrapper])
    unused += [".".join([*path, name]) for name, value in content.items() if not _has_tensors(value)]
    content = {name: value for name, value in content.items() if _has_tensors(value)}
    if not all(isinstance(value, Tensor) for value in content.values()):
        raise ConversionError(
            f"{source} does not contain a state dict, at the top or under {', '.join(WRAPPERS)}; its tensors are under "
            f"{first_names([repr(name) for name in content])}. Save the dict of weights alone as a .pth file and convert that."
        )
    return OfficialWeights(content, tuple(path), tuple(unused))


def _groups(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the content of each wrapper: a dict of that name, or all entries whose names start with it and a dot."""
    groups: dict[str, dict[str, Any]] = {}
    for name, value in content.items():
        if isinstance(value, dict):
            groups.setdefault(name, {}).update(value)
        elif "." in name:
            groups.setdefault(_first(name), {})[name.partition(".")[2]] = value
    return groups


def _first(name: str) -> str:
    return name.partition(".")[0]


def _named(content: Any) -> dict[str, Any]:
    return {str(name): value for name, value in content.items()} if isinstance(content, dict) else {}


def _has_tensors(value: Any) -> bool:
    values, visited = [value], set[int]()
    while values:
        value = values.pop()
        if isinstance(value, Tensor):
            return True
        if isinstance(value, dict) and id(value) not in visited:  # a dict may contain itself
            visited.add(id(value))
            values += value.values()
    return False


class _Placeholder:
    """Takes the place of a settings object, whose content is not needed."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _empty(*arguments: Any) -> OrderedDict[Any, Any]:
    """Take the place of `defaultdict`, whose argument would be called."""
    return OrderedDict()


_STAND_INS: dict[Any, tuple[str, ...]] = {
    argparse.Namespace: ("argparse.Namespace", "types.SimpleNamespace"),
    PurePosixPath: ("pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib._local.PosixPath"),
    PureWindowsPath: ("pathlib.WindowsPath", "pathlib.PureWindowsPath", "pathlib._local.WindowsPath"),
    OrderedDict: (
        "addict.addict.Dict",
        "detectron2.config.config.CfgNode",
        "easydict.EasyDict",
        "fvcore.common.config.CfgNode",
        "lightning.fabric.utilities.data.AttributeDict",
        "lightning_fabric.utilities.data.AttributeDict",
        "mmcv.utils.config.ConfigDict",
        "mmengine.config.config.ConfigDict",
        "pytorch_lightning.utilities.parsing.AttributeDict",
        "yacs.config.CfgNode",
    ),
    _empty: ("collections.defaultdict",),
    _Placeholder: (
        "mmengine.logging.history_buffer.HistoryBuffer",
        "omegaconf.base.ContainerMetadata",
        "omegaconf.base.Metadata",
        "omegaconf.dictconfig.DictConfig",
        "omegaconf.listconfig.ListConfig",
        *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "Boolean", "Bytes", "Enum", "Float", "Integer", "Path", "String")),
        "typing.Any",
        *(f"{core}.multiarray.{name}" for core in ("numpy.core", "numpy._core") for name in ("scalar", "_reconstruct")),
        "numpy.ndarray",
        "numpy.dtype",
        *(f"builtins.{name}" for name in ("bool", "dict", "float", "getattr", "int", "list", "str", "tuple")),
    ),
}
_READABLE: list[Any] = [(stand_in, name) for stand_in, names in _STAND_INS.items() for name in names]


def _load(source: Path) -> Any:
    """Return the content of a .pth file, with placeholders for the settings objects of common libraries."""
    with source.open("rb") as file:
        start = file.read(2)
    if start != b"PK" and start[:1] != b"\x80":  # a zip archive, or a pickle as older versions of torch wrote
        raise ConversionError(
            f"{source} {'is not a PyTorch file' if start else 'is empty'}: convert takes an official .pth checkpoint."
        )
    known = [entry for entry in _READABLE if entry not in torch.serialization.get_safe_globals()]  # those stay registered
    try:
        with torch.serialization.safe_globals(known), warnings.catch_warnings(action="ignore"):
            return torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a file that is damaged or is not a checkpoint
        refused = re.search(r"GLOBAL (\S+) was", str(error))
        if refused is None:
            reason = str(error).strip().split("\n")[0].split(". ")[0]
            raise ConversionError(
                f"{source} cannot be read safely as a PyTorch checkpoint ({type(error).__name__}: {reason}). Is it complete?"
            ) from None
    raise ConversionError(
        f"{source} cannot be read safely: it holds {refused[1]}, and reading such an object could run code. Where it was "
        "written, save the weights alone, torch.save(model.state_dict(), 'weights.pth'), and convert that file."
    )
