"""The official layout of ISDA's checkpoints (yingkaining/isda), and the rules that rename its entries."""

from collections.abc import Mapping

from torch import Tensor

from maskset.conversion import mmdet
from maskset.conversion.class_names import used_categories
from maskset.conversion.keys import Rule, prefix_rules, rename, require, resnet_name, split_queries, transformer_settings
from maskset.systems.base import BackboneConfig
from maskset.systems.isda import IsdaConfig

categories = used_categories  # what the class channels stand for
_MASK_FEATURE_HEAD = {
    "convs_all_levels.#.conv#.conv": "branches.#.#.convolution",
    "convs_all_levels.#.conv#.gn": "branches.#.#.norm",
    "conv_pred.0.conv": "output.convolution",
    "conv_pred.0.gn": "output.norm",
}
_HEAD = {
    "transformer.reference_points": "reference_points",
    "query_embedding.weight": "query",  # split below
    "cls_branches.#": "class_head",  # one module, listed once for every decoder layer
    **{f"kernel_branches.#.{2 * i}": f"kernel_head.layers.{i}" for i in range(3)},  # likewise
}
RULES: list[Rule] = [
    *mmdet.RULES,
    *prefix_rules({"conv": "convolutions.0", "gn": "norms.0"}, "neck.first_conv.", "project_finest."),
    *prefix_rules(_MASK_FEATURE_HEAD, "mask_feat_head.", "mask_feature_head."),
    *prefix_rules(_HEAD, "bbox_head."),
]


def convert(state: Mapping[str, Tensor], use_last_copy: bool = False) -> tuple[IsdaConfig, dict[str, Tensor]]:
    """Return the settings of an official model, read from the shapes of its state dict, and our state dict.

    Raises:
        ConversionError: an entry is unknown or missing, or copies differ and not `use_last_copy`.
    """
    ours = split_queries(rename(state, RULES, use_last_copy))
    hidden, width = require(ours, "mask_feature_head.branches.3.0.convolution.weight", 4).shape[:2]
    mask_dim = require(ours, "mask_feature_head.output.convolution.weight", 4).shape[0]
    settings = transformer_settings(ours)
    config = IsdaConfig(
        **settings,
        backbone=BackboneConfig(name=resnet_name(ours)),
        num_classes=require(ours, "class_head.weight", 2).shape[0],
        num_queries=len(ours["query_position"]),
        mask_hidden_dim=hidden,
        mask_dim=mask_dim,
        feature_coordinates=width > settings["hidden_dim"],
        kernel_position=require(ours, "kernel_head.layers.2.weight", 2).shape[0] < mask_dim,
    )
    return config, ours
