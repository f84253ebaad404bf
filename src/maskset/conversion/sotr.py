"""The official layout of SOTR's checkpoints (easton-cau/SOTR, detectron2), and what its names become."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from maskset.conversion import detectron2
from maskset.conversion.coco import used_categories
from maskset.conversion.keys import Rule, count, need, rename, resnet_name
from maskset.errors import ConversionError
from maskset.systems.sotr import SotrConfig

categories = used_categories  # what the class channels stand for
_BLOCKS = r"cate_head\.transformer\.layers\.blocks"
_LEVELS = r"mask_head\.convs_all_levels\.(\d)\.conv(\d)"
_RULES: list[Rule] = [
    *detectron2.RULES,
    (r"cate_head\.cate_pred\.(weight|bias)", r"class_head.\1"),
    (r"cate_head\.kernel_pred\.(weight|bias)", r"kernel_head.\1"),
    (rf"{_LEVELS}\.0\.weight", r"mask_feature_head.branches.\1.\2.convolution.weight"),
    (rf"{_LEVELS}\.1\.(weight|bias)", r"mask_feature_head.branches.\1.\2.norm.\3"),
    (r"mask_head\.conv_pred\.0\.weight", r"mask_feature_head.output.convolution.weight"),
    (r"mask_head\.conv_pred\.1\.(weight|bias)", r"mask_feature_head.output.norm.\1"),
]


def rules(depth: int) -> list[Rule]:
    """Return the rules for a transformer of `depth` layers, each of which the official code has as two blocks."""
    result = list(_RULES)
    for layer in range(depth):
        attention, convolutions = rf"{_BLOCKS}\.{2 * layer}", rf"{_BLOCKS}\.{2 * layer + 1}"
        ours = f"transformer.layers.{layer}"
        for i, part in enumerate(("columns", "rows")):
            result += [
                (rf"{attention}\.{i}\.fn\.g", f"{ours}.gate.{i}"),
                (rf"{attention}\.{i}\.fn\.fn\.to_q\.weight", f"{ours}.{part}.query.weight"),
                (rf"{attention}\.{i}\.fn\.fn\.to_kv\.weight", f"{ours}.{part}.key_value.weight"),
                (rf"{attention}\.{i}\.fn\.fn\.to_out\.(weight|bias)", rf"{ours}.{part}.output.\1"),
                (rf"{convolutions}\.{i}\.g", f"{ours}.gate.{i + 2}"),
                (rf"{convolutions}\.{i}\.fn\.0\.(weight|bias)", rf"{ours}.convolutions.{i}.first.\1"),
                (rf"{convolutions}\.{i}\.fn\.2\.(weight|bias)", rf"{ours}.convolutions.{i}.second.\1"),
            ]
    return result


def convert(state: Mapping[str, Tensor], last_wins: bool = False) -> tuple[SotrConfig, dict[str, Tensor]]:
    """Return the config that fits an official state dict, read off its names and shapes, and our state dict.

    Raises:
        ConversionError: an entry is unknown or missing, or the backbone is one that is not built here.
    """
    depth = count(state, rf"{_BLOCKS}\.(\d+)\.") // 2
    ours = rename(state, rules(depth), last_wins)
    for layer in range(depth):
        path = f"transformer.layers.{layer}"
        gates = [f"{path}.gate.{i}" for i in range(4)]
        for part in (f"{path}.columns", f"{path}.rows"):
            key_value = need(ours, f"{part}.key_value.weight", 2)
            if len(key_value) < 2:
                raise ConversionError(
                    f"the entry for our {part}.key_value.weight has {len(key_value)} rows, not twice the width."
                )
            ours[f"{part}.key.weight"], ours[f"{part}.value.weight"] = key_value.chunk(2)
            del ours[f"{part}.key_value.weight"]
        ours[f"{path}.gates"] = torch.stack([need(ours, gate, 0) for gate in gates])
        ours = {name: value for name, value in ours.items() if name not in gates}
    return _config(ours, depth), {name: value.contiguous() for name, value in ours.items()}


def _config(state: Mapping[str, Tensor], depth: int) -> SotrConfig:
    classes, width = need(state, "class_head.weight", 2).shape
    name, deformable = resnet_name(state), _deformable_stages(state)
    # Base and R101 are tested at a short side of 800 pixels, R50 and R101-DCN at 1000.
    short_side = 800 if name.startswith("resnet101") and not deformable else 1000
    return SotrConfig(
        num_classes=classes,
        input=replace(SotrConfig().input, short_side=short_side),
        backbone=replace(SotrConfig().backbone, name=name, deformable_stages=deformable),
        hidden_dim=width,
        depth=depth,
        mask_hidden_dim=need(state, "mask_feature_head.branches.0.0.convolution.weight", 4).shape[0],
        mask_dim=need(state, "mask_feature_head.output.convolution.weight", 4).shape[0],
    )


def _deformable_stages(state: Mapping[str, Tensor]) -> int:
    """Return in how many of the last stages the 3x3 convolutions are deformable."""
    stages = 0
    for stage in (4, 3, 2, 1):
        blocks = count(state, rf"backbone\.body\.layer{stage}\.(\d+)\.")
        deformable = count(state, rf"backbone\.body\.layer{stage}\.(\d+)\.conv2\.offset\.")
        if deformable not in (0, blocks) or (deformable and stages != 4 - stage):
            raise ConversionError(
                f"{deformable} of {blocks} blocks in stage {stage} of the backbone have deformable convolutions: what is built "
                "here has them in all blocks of the last stages, as detectron2's build_resnet_fpn_backbone has."
            )
        stages += deformable > 0
    return stages
