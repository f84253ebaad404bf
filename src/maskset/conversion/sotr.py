"""The official layout of SOTR's checkpoints (easton-cau/SOTR, detectron2), and the rules that rename its entries."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from maskset.conversion import detectron2
from maskset.conversion.class_names import used_categories
from maskset.conversion.keys import Rule, count, prefix_rules, rename, require, resnet_name
from maskset.errors import ConversionError
from maskset.systems.sotr import SotrConfig

categories = used_categories  # what the class channels stand for
_BLOCKS = "cate_head.transformer.layers.blocks"
_MASK_FEATURE_HEAD = {
    "convs_all_levels.#.conv#.0": "branches.#.#.convolution",
    "convs_all_levels.#.conv#.1": "branches.#.#.norm",
    "conv_pred.0": "output.convolution",
    "conv_pred.1": "output.norm",
}
_RULES: list[Rule] = [
    *detectron2.RULES,
    *prefix_rules({"cate_pred": "class_head", "kernel_pred": "kernel_head"}, "cate_head."),
    *prefix_rules(_MASK_FEATURE_HEAD, "mask_head.", "mask_feature_head."),
]


def rules(depth: int) -> list[Rule]:
    """Return the rules for a transformer of `depth` layers; in the official code each layer is two blocks."""
    names = {}
    for layer in range(depth):
        for i, part in enumerate(("columns", "rows")):
            attention, convolutions = f"{2 * layer}.{i}.fn", f"{2 * layer + 1}.{i}"
            names |= {
                f"{attention}.g": f"{layer}.gate.{i}",
                f"{attention}.fn.to_q": f"{layer}.{part}.query",
                f"{attention}.fn.to_kv": f"{layer}.{part}.key_value",
                f"{attention}.fn.to_out": f"{layer}.{part}.output",
                f"{convolutions}.g": f"{layer}.gate.{i + 2}",
                f"{convolutions}.fn.0": f"{layer}.convolutions.{i}.first",
                f"{convolutions}.fn.2": f"{layer}.convolutions.{i}.second",
            }
    return [*_RULES, *prefix_rules(names, f"{_BLOCKS}.", "transformer.layers.")]


def convert(state: Mapping[str, Tensor], use_last_copy: bool = False) -> tuple[SotrConfig, dict[str, Tensor]]:
    """Return the settings of an official model, read from names and shapes of its state dict, and our state dict.

    Raises:
        ConversionError: an entry is unknown or missing, or the backbone is of an unknown kind.
    """
    depth = count(state, rf"{_BLOCKS}\.(\d+)\.") // 2
    ours = rename(state, rules(depth), use_last_copy)
    for layer in range(depth):
        path = f"transformer.layers.{layer}"
        gates = [f"{path}.gate.{i}" for i in range(4)]
        for part in (f"{path}.columns", f"{path}.rows"):
            key_value = require(ours, f"{part}.key_value.weight", 2)
            if len(key_value) < 2:
                raise ConversionError(
                    f"the tensor for maskset's {part}.key_value.weight has {len(key_value)} rows, not twice the width."
                )
            ours[f"{part}.key.weight"], ours[f"{part}.value.weight"] = key_value.chunk(2)
            del ours[f"{part}.key_value.weight"]
        ours[f"{path}.gates"] = torch.stack([require(ours, gate, 0) for gate in gates])
        ours = {name: value for name, value in ours.items() if name not in gates}
    return _config(ours, depth), {name: value.contiguous() for name, value in ours.items()}


def _config(state: Mapping[str, Tensor], depth: int) -> SotrConfig:
    classes, width = require(state, "class_head.weight", 2).shape
    name, deformable = resnet_name(state), _deformable_stages(state)
    # Base and R101 are tested at a short side of 800 pixels, R50 and R101-DCN at 1000.
    short_side = 800 if name.startswith("resnet101") and not deformable else 1000
    return SotrConfig(
        num_classes=classes,
        input=replace(SotrConfig().input, short_side=short_side),
        backbone=replace(SotrConfig().backbone, name=name, deformable_stages=deformable),
        hidden_dim=width,
        depth=depth,
        mask_hidden_dim=require(state, "mask_feature_head.branches.0.0.convolution.weight", 4).shape[0],
        mask_dim=require(state, "mask_feature_head.output.convolution.weight", 4).shape[0],
    )


def _deformable_stages(state: Mapping[str, Tensor]) -> int:
    """Return the number of last stages with deformable 3x3 convolutions."""
    stages = 0
    for stage in (4, 3, 2, 1):
        blocks = count(state, rf"backbone\.body\.layer{stage}\.(\d+)\.")
        deformable = count(state, rf"backbone\.body\.layer{stage}\.(\d+)\.conv2\.offset\.")
        if deformable not in (0, blocks) or (deformable and stages != 4 - stage):
            raise ConversionError(
                f"{deformable} of {blocks} blocks in stage {stage} of the backbone have deformable convolutions: maskset "
                "builds backbones with them in all blocks of the last stages, as detectron2's build_resnet_fpn_backbone does."
            )
        stages += deformable > 0
    return stages
