"""Weights of detectron2: the names in its ResNets and feature pyramids, and reading its .pkl files without running them."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskset.conversion.keys import Rule, prefix_rules, rename_known

_EPS = 1e-5  # of the batch norms
_STAGE = {  # from detectron2's names to timm's
    "conv2_offset": "conv2.offset",
    "conv#.norm": "bn#",
    "conv#": "conv#",
    "shortcut.norm": "downsample.1",
    "shortcut": "downsample.0",
}
RESNET_RULES: list[Rule] = [
    *prefix_rules({"stem.conv1.norm": "bn1", "stem.conv1": "conv1"}),
    *[rule for stage in (1, 2, 3, 4) for rule in prefix_rules(_STAGE, f"res{stage + 1}.#.", f"layer{stage}.#.")],
]
_CAFFE2_RULES: list[Rule] = [  # from the names of MSRA's weights, which were converted by Caffe2, to detectron2's
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
    *prefix_rules({f"lateral{level + 2}": f"lateral.{level}" for level in range(4)}, "backbone.fpn_", "pyramid."),
    *prefix_rules({f"output{level + 2}": f"output.{level}" for level in range(4)}, "backbone.fpn_", "pyramid."),
]


def rename_resnet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return detectron2's ResNet weights under timm's names; other entries (the classifier) keep theirs.

    The batch norms in MSRA's weights are a scale and a shift; they get a mean of 0 and a variance of 1.
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
    """Return whether the weights are MSRA's, of a ResNet with the strides of Caffe: its batch norms have no statistics."""
    return "conv1_w" in state or ("stem.conv1.norm.weight" in state and "stem.conv1.norm.running_mean" not in state)


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Return the arrays in a .pkl file of detectron2, as tensors.

    Only NumPy arrays and plain containers are created; a file that names anything else is refused before any of its code runs.

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


_ALLOWED = {
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
}


class _Arrays(pickle.Unpickler):
    """An unpickler that creates arrays and plain containers only."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not an array")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)
