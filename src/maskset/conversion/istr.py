"""The official checkpoints of ISTR of May 2021 (hujiecpp/ISTR), the paper's model, and what their names become."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from maskset.conversion import detectron2
from maskset.conversion.coco import used_categories
from maskset.conversion.keys import Rule, count, need, rename, resnet_name
from maskset.errors import ConversionError
from maskset.systems.base import BackboneConfig
from maskset.systems.istr import IstrConfig

categories = used_categories  # what the class channels stand for
STAGE = r"head\.head_series\.(\d+)"  # a stage of the official head


def tower(official: str, ours: str) -> list[Rule]:
    """Return the rules for the three layers of a prediction head: each is three entries of a sequence there."""
    rules: list[Rule] = []
    for i in range(3):
        rules.append((rf"{STAGE}\.{official}\.{3 * i}\.weight", rf"stages.\1.{ours}.layers.{i}.weight"))
        rules.append((rf"{STAGE}\.{official}\.{3 * i + 1}\.(weight|bias)", rf"stages.\1.{ours}.norms.{i}.\2"))
    return rules


SHARED_RULES: list[Rule] = [  # with the checkpoints of 2022
    *detectron2.RULES,
    (r"pos_embeddings\.weight", r"query_position"),
    (r"init_proposal_boxes\.weight", r"query_boxes"),
    (r"mask_encoding\.(components|explained_variances|means)", r"codec.\1"),
    (rf"{STAGE}\.self_attn\.(.*)", r"stages.\1.encoder.self_attention.\2"),
    *[
        (rf"{STAGE}\.{old}\.(weight|bias)", rf"stages.\1.encoder.{new}.\2")
        for old, new in [
            (r"inst_interact\.dynamic_layer", "region_attention.weights"),
            (r"inst_interact\.norm1", "region_attention.hidden_norm"),
            (r"inst_interact\.norm2", "region_attention.cell_norm"),
            (r"inst_interact\.out_layer", "region_attention.output"),
            (r"inst_interact\.norm3", "region_attention.output_norm"),
            ("linear1", "up"),
            ("linear2", "down"),
            ("norm1", "self_norm"),
            ("norm2", "region_norm"),
            ("norm3", "norm"),
        ]
    ],
    *tower("cls_module", "class_tower"),
    (rf"{STAGE}\.class_logits\.(weight|bias)", r"class_heads.\1.\2"),
    *tower("reg_module", "box_head.0"),
    (rf"{STAGE}\.bboxes_delta\.(weight|bias)", r"stages.\1.box_head.1.\2"),
]
RULES: list[Rule] = [
    *SHARED_RULES,
    *tower("mask_module", "mask_head.0"),
    (rf"{STAGE}\.mask_logits\.(weight|bias)", r"stages.\1.mask_head.1.\2"),
]


def convert(state: Mapping[str, Tensor], last_wins: bool = False) -> tuple[IstrConfig, dict[str, Tensor]]:
    """Return the config that fits an official state dict, read off its shapes, and our state dict.

    Raises:
        ConversionError: an entry is unknown or missing, or it is a checkpoint of 2022.
    """
    if any(".mask_module.0.bias" in name for name in state):
        raise ConversionError("this is a checkpoint of the code of 2022, another model: convert it as istr-smt.")
    ours = rename(state, RULES, last_wins)
    length, pixels = need(ours, "codec.components", 2).shape
    ours["codec.fitted"] = torch.tensor(True)
    return IstrConfig(**shared_settings(ours), mask_size=math.isqrt(pixels), code_length=length), ours


def shared_settings(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the settings of both models that can be read off the shapes of our state dict; all official ones have 8 heads."""
    queries, width = need(state, "query_position", 2).shape
    if not width:
        raise ConversionError("the entry for our query_position has no columns: the file is damaged.")
    return {
        "backbone": BackboneConfig(name=resnet_name(state)),
        "num_classes": need(state, "class_heads.0.weight", 2).shape[0],
        "hidden_dim": width,
        "num_queries": queries,
        "stages": count(state, r"stages\.(\d+)\."),
        "roi_size": math.isqrt(need(state, "stages.0.encoder.region_attention.output.weight", 2).shape[1] // width),
        "dynamic_dim": need(state, "stages.0.encoder.region_attention.hidden_norm.weight", 1).shape[0],
        "feedforward_dim": need(state, "stages.0.encoder.up.weight", 2).shape[0],
    }
