"""Weights of detectron2: the names in its ResNets and feature pyramids, and reading its .pkl files without running them."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskset.conversion.keys import Rule, rename_known

_EPS = 1e-5  # of the batch norms
_NORM = r"(weight|bias|running_mean|running_var)"
RESNET_RULES: list[Rule] = [  # from detectron2's names to timm's
    (r"stem\.conv1\.weight", r"conv1.weight"),
    (rf"stem\.conv1\.norm\.{_NORM}", r"bn1.\1"),
    *[
        rule
        for stage in (1, 2, 3, 4)
        for rule in [
            (rf"res{stage + 1}\.(\d+)\.conv(\d)\.weight", rf"layer{stage}.\1.conv\2.weight"),
            (rf"res{stage + 1}\.(\d+)\.conv(\d)\.norm\.{_NORM}", rf"layer{stage}.\1.bn\2.\3"),
            (rf"res{stage + 1}\.(\d+)\.conv2_offset\.(weight|bias)", rf"layer{stage}.\1.conv2.offset.\2"),
            (rf"res{stage + 1}\.(\d+)\.shortcut\.weight", rf"layer{stage}.\1.downsample.0.weight"),
            (rf"res{stage + 1}\.(\d+)\.shortcut\.norm\.{_NORM}", rf"layer{stage}.\1.downsample.1.\2"),
        ]
    ],
]
_CAFFE2_RULES: list[Rule] = [  # from the names of MSRA's own weights, which went through Caffe2, to detectron2's
    (r"conv1_w", r"stem.conv1.weight"),
    (r"res_conv1_bn_s", r"stem.conv1.norm.weight"),
    (r"res_conv1_bn_b", r"stem.conv1.norm.bias"),
    *[
        rule
        for old, new in {"branch1": "shortcut", "branch2a": "conv1", "branch2b": "conv2", "branch2c": "conv3"}.items()
        for rule in [
            (rf"res(\d)_(\d+)_{old}_w", rf"res\1.\2.{new}.weight"),
            (rf"res(\d)_(\d+)_{old}_bn_s", rf"res\1.\2.{new}.norm.weight"),
            (rf"res(\d)_(\d+)_{old}_bn_b", rf"res\1.\2.{new}.norm.bias"),
        ]
    ],
]
RULES: list[Rule] = [  # of a ResNet with a feature pyramid, for ISTR and SOTR
    *[(rf"backbone\.bottom_up\.{old}", f"backbone.body.{new}") for old, new in RESNET_RULES],
    *[
        (rf"backbone\.fpn_{part}{level}\.(weight|bias)", rf"pyramid.{part}.{level - 2}.\1")
        for part in ("lateral", "output")
        for level in (2, 3, 4, 5)
    ],
]


def rename_resnet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return detectron2's ResNet weights under timm's names; what has no place there (the classifier) keeps its name.

    MSRA's weights have batch norms as a scale and a shift only: mean and variance become those that change nothing.
    """
    named = rename_known(rename_known(state, _CAFFE2_RULES), RESNET_RULES)
    for name, value in list(named.items()):
        norm, _, part = name.rpartition(".")
        if part == "weight" and f"{norm}.bias" in named and value.dim() == 1:
            named.setdefault(f"{norm}.running_mean", torch.zeros_like(value))
            named.setdefault(f"{norm}.running_var", torch.ones_like(value) - _EPS)
    return named


def is_detectron2(state: Mapping[str, Tensor]) -> bool:
    """Return whether the weights have the names that `rename_resnet` knows."""
    return "stem.conv1.weight" in state or "conv1_w" in state


def is_msra(state: Mapping[str, Tensor]) -> bool:
    """Return whether they are MSRA's, of a ResNet with the strides of Caffe: those have batch norms without statistics."""
    return "conv1_w" in state or ("stem.conv1.norm.weight" in state and "stem.conv1.norm.running_mean" not in state)


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Return the arrays in a .pkl file of detectron2, as tensors.

    Only NumPy's arrays and plain containers are made: a file that names anything else is refused before it is run.

    Raises:
        pickle.UnpicklingError: the file holds something else, or is damaged.
    """
    with path.open("rb") as file:
        content: Any = _Arrays(file, encoding="latin1").load()  # Python 2 wrote some of them
    for key in ("model", "blobs"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise pickle.UnpicklingError(f"it holds a {type(content).__name__} instead of named arrays")
    arrays = {str(name): value for name, value in content.items() if isinstance(value, np.ndarray)}
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items() if array.dtype.kind in "fiub"}


_MAKERS = {
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
}


class _Arrays(pickle.Unpickler):
    """A reader of pickles that knows no more than what arrays are made of."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _MAKERS:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not an array")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)
