"""The official checkpoints of ISTR of May 2021 (hujiecpp/ISTR), the paper's model, and the rules that rename their entries."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from maskset.conversion import detectron2
from maskset.conversion.class_names import used_categories
from maskset.conversion.keys import Rule, count, prefix_rules, rename, require, resnet_name
from maskset.errors import ConversionError
from maskset.systems.base import BackboneConfig
from maskset.systems.istr import IstrConfig

categories = used_categories  # what the class channels stand for
_ENCODER = {
    "self_attn": "self_attention",
    "inst_interact.dynamic_layer": "region_attention.weights",
    "inst_interact.norm1": "region_attention.hidden_norm",
    "inst_interact.norm2": "region_attention.cell_norm",
    "inst_interact.out_layer": "region_attention.output",
    "inst_interact.norm3": "region_attention.output_norm",
    "linear1": "up",
    "linear2": "down",
    "norm1": "self_norm",
    "norm2": "region_norm",
    "norm3": "norm",
}


def _tower(official: str, ours: str) -> dict[str, str]:
    """Return the names of the three layers of a prediction head; officially each layer is three modules of a sequence."""
    layers = {f"{official}.{3 * i}": f"{ours}.layers.{i}" for i in range(3)}
    return layers | {f"{official}.{3 * i + 1}": f"{ours}.norms.{i}" for i in range(3)}


def stage_rules(names: dict[str, str]) -> list[Rule]:
    """Return the rules for parts of a stage."""
    return prefix_rules(names, "head.head_series.#.", "stages.#.")


SHARED_RULES: list[Rule] = [  # shared with the checkpoints of 2022
    *detectron2.RULES,
    *prefix_rules({"pos_embeddings.weight": "query_position", "init_proposal_boxes.weight": "query_boxes"}),
    *prefix_rules({"mask_encoding": "codec", "head.head_series.#.class_logits": "class_heads.#"}),
    *stage_rules({old: f"encoder.{new}" for old, new in _ENCODER.items()}),
    *stage_rules(_tower("cls_module", "class_tower") | _tower("reg_module", "box_head.0")),
    *stage_rules({"bboxes_delta": "box_head.1"}),
]
RULES = [*SHARED_RULES, *stage_rules(_tower("mask_module", "mask_head.0") | {"mask_logits": "mask_head.1"})]


def convert(state: Mapping[str, Tensor], use_last_copy: bool = False) -> tuple[IstrConfig, dict[str, Tensor]]:
    """Return the settings of an official model, read from the shapes of its state dict, and our state dict.

    Raises:
        ConversionError: an entry is unknown or missing, or it is a checkpoint of 2022.
    """
    if any(".mask_module.0.bias" in name for name in state):
        raise ConversionError("this is a checkpoint of the code of 2022, another model: convert it as istr-smt.")
    ours = rename(state, RULES, use_last_copy)
    length, pixels = require(ours, "codec.components", 2).shape
    ours["codec.fitted"] = torch.tensor(True)
    return IstrConfig(**shared_settings(ours), mask_size=math.isqrt(pixels), code_length=length), ours


def shared_settings(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the settings of ISTR and ISTR-SMT that the shapes of our state dict show; all official models have 8 heads."""
    queries, width = require(state, "query_position", 2).shape
    if not width:
        raise ConversionError("the tensor for maskset's query_position has no columns: the file is damaged.")
    return {
        "backbone": BackboneConfig(name=resnet_name(state)),
        "num_classes": require(state, "class_heads.0.weight", 2).shape[0],
        "hidden_dim": width,
        "num_queries": queries,
        "stages": count(state, r"stages\.(\d+)\."),
        "roi_size": math.isqrt(require(state, "stages.0.encoder.region_attention.output.weight", 2).shape[1] // width),
        "dynamic_dim": require(state, "stages.0.encoder.region_attention.hidden_norm.weight", 1).shape[0],
        "feedforward_dim": require(state, "stages.0.encoder.up.weight", 2).shape[0],
    }
