"""Initial weights for our systems from mmdetection's plain Deformable DETR (deformable_detr_r50), trained on COCO's boxes.

The published ISDA started from them. Any system with a deformable transformer can use the layers that fit its shapes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from maskset.conversion import mmdet
from maskset.conversion.class_names import used_categories
from maskset.conversion.keys import Rule, prefix_rules, rename, require, split_queries
from maskset.errors import ConversionError
from maskset.systems import System, SystemConfig, build

_HEAD = {
    "transformer.reference_points": "reference_points",
    "query_embedding.weight": "query",  # split below
    "cls_branches.#": "class_head",  # one module, listed once for every decoder layer
}
RULES: list[Rule] = [
    *mmdet.RULES,
    *prefix_rules(_HEAD, "bbox_head."),
    (r"bbox_head\.reg_branches\.\d+\..*", None),  # refine a box from a fixed point, which none of our systems does
]


@dataclass(frozen=True)
class Initialization:
    """A model initialized from Deformable DETR.

    Attributes:
        model: with COCO's classes; tensors that are not in the file have random values, from seed 0.
        copied: names of the model's tensors that were copied from the file.
        initial: names of the model's tensors that were not.
        unused: names of the file's entries that the model has no place for.
    """

    model: System
    copied: list[str]
    initial: list[str]
    unused: list[str]

    def __str__(self) -> str:
        parts = {"copied": self.copied, "initialized randomly": self.initial, "not used": self.unused}
        return "\n".join(f"{word}, {len(names)} tensors: {_grouped(names)}" for word, names in parts.items() if names)


def initialize(config: SystemConfig, state: Mapping[str, Tensor], use_last_copy: bool = False) -> Initialization:
    """Return a model of a system with all weights of a Deformable DETR that fit it.

    Args:
        config: of any system with a deformable transformer, such as a recipe's; its classes become the file's.
        state: official names and tensors.
        use_last_copy: where copies of one tensor differ, use the last, as official loading does.

    Raises:
        ConversionError: an entry is unknown or missing, copies differ, or nothing fits.
    """
    backbone = config.backbone
    if backbone is not None and backbone.stride_in_first:
        raise ConversionError(
            f"{config.system} cannot start from a Deformable DETR: its ResNet puts the stride in a different convolution, "
            "which tensor shapes cannot reveal."
        )
    tensors = split_queries(rename(state, RULES, use_last_copy))
    classes = len(require(tensors, "class_head.bias", 1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(dataclasses.replace(config, num_classes=classes), used_categories(classes))
    own = model.state_dict()  # shares its memory with the model's
    source = {name: _source(name) for name in own if _source(name) in tensors}
    other_shapes = {_layer(name) for name in source if tensors[source[name]].shape != own[name].shape}
    copied = [name for name in source if _layer(name) not in other_shapes]  # not a bias without its weight
    if not copied:
        raise ConversionError(
            f"nothing of the Deformable DETR fits {config.system} with backbone {backbone.name if backbone else None}."
        )
    for name in copied:
        own[name].copy_(tensors[source[name]])
    used = {source[name] for name in copied}
    unused = [name for name in tensors if name not in used] + [name for name in state if ".reg_branches." in name]
    return Initialization(model, copied, [name for name in own if name not in copied], unused)


def _source(name: str) -> str:
    """Return the name in the file of a tensor of ours; the file's one class head initializes each of several class heads."""
    parts = name.split(".")
    return f"class_head.{parts[-1]}" if parts[0] == "class_heads" else name


def _layer(name: str) -> str:
    return name.rpartition(".")[0] or name


def _grouped(names: Sequence[str]) -> str:
    """Return the parts of a network that the tensors are in, with their numbers of tensors."""
    parts = [name.removeprefix("bbox_head.").split(".")[0] for name in names]
    return ", ".join(f"{part} {parts.count(part)}" for part in dict.fromkeys(parts))
