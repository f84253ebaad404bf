"""A start for our systems: the plain Deformable DETR of mmdetection (deformable_detr_r50), trained on COCO's boxes.

ISDA was published with this start. Any system on the deformable transformer can take what fits its shapes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from maskset.conversion import mmdet
from maskset.conversion.coco import used_categories
from maskset.conversion.keys import Rule, need, rename
from maskset.errors import ConversionError
from maskset.systems import System, SystemConfig, build

_BOXES = r"bbox_head\.reg_branches\.\d+\..*"  # move a box from a fixed point: no system of ours does just that
RULES: list[Rule] = [
    *mmdet.RULES,
    (r"bbox_head\.transformer\.reference_points\.(weight|bias)", r"reference_points.\1"),
    (r"bbox_head\.query_embedding\.weight", r"query"),  # split below
    (r"bbox_head\.cls_branches\.\d+\.(weight|bias)", r"class_head.\1"),  # one module, listed once for every decoder layer
    (_BOXES, None),
]


@dataclass(frozen=True)
class Start:
    """A model initialised from Deformable DETR, and the fate of every tensor.

    Attributes:
        model: with COCO's classes; tensors without a counterpart have their random initial values, from seed 0.
        copied: names of the model's tensors that were in the file.
        new: names of the model's tensors without a counterpart in the file.
        left: names of the file's entries without a counterpart in the model.
    """

    model: System
    copied: list[str]
    new: list[str]
    left: list[str]

    def __str__(self) -> str:
        parts = {"copied": self.copied, "initialised": self.new, "left out": self.left}
        return "\n".join(f"{word}, {len(names)} tensors: {_grouped(names)}" for word, names in parts.items() if names)


def start(config: SystemConfig, state: Mapping[str, Tensor], last_wins: bool = False) -> Start:
    """Return a model of a system that has all of a Deformable DETR that fits it.

    Args:
        config: of any system on the deformable transformer, such as a recipe's; its classes become the file's.
        state: official names and tensors.
        last_wins: where copies of one tensor differ, take the last, as official loading does.

    Raises:
        ConversionError: an entry is unknown or missing, copies differ, or nothing fits.
    """
    backbone = config.backbone
    if backbone is not None and backbone.stride_in_first:
        raise ConversionError(
            f"{config.system} cannot start from a Deformable DETR: its ResNet puts the stride in a different convolution, "
            "which tensor shapes cannot reveal."
        )
    tensors = rename(state, RULES, last_wins)
    position, content = need(tensors, "query", 2).chunk(2, dim=1)
    del tensors["query"]
    tensors |= {"query_position": position, "query_content": content}
    classes = len(need(tensors, "class_head.bias", 1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(dataclasses.replace(config, num_classes=classes), used_categories(classes))
    own = model.state_dict()  # shares its memory with the model's
    source = {name: _source(name) for name in own if _source(name) in tensors}
    unlike = {_layer(name) for name in source if tensors[source[name]].shape != own[name].shape}
    copied = [name for name in source if _layer(name) not in unlike]  # a bias is worth nothing without its weight
    if not copied:
        raise ConversionError(
            f"nothing of the Deformable DETR fits {config.system} with backbone {backbone.name if backbone else None}."
        )
    for name in copied:
        own[name].copy_(tensors[source[name]])
    used = {source[name] for name in copied}
    left = [name for name in tensors if name not in used] + [name for name in state if name.startswith("bbox_head.reg_branches.")]
    return Start(model, copied, [name for name in own if name not in copied], left)


def _source(name: str) -> str:
    """Return what the file calls a tensor of ours: its one class head is the start of each of several."""
    parts = name.split(".")
    return f"class_head.{parts[-1]}" if parts[0] == "class_heads" else name


def _layer(name: str) -> str:
    return name.rpartition(".")[0] or name


def _grouped(names: Sequence[str]) -> str:
    """Return the parts of a network that tensors belong to, with how many there are of each."""
    parts = [name.removeprefix("bbox_head.").split(".")[0] for name in names]
    return ", ".join(f"{part} {parts.count(part)}" for part in dict.fromkeys(parts))
