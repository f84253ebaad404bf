"""The official SOIT checkpoints (hikvision-research/opera), and the rules that rename their entries."""

from collections.abc import Mapping

from torch import Tensor

from maskset.conversion import mmdet
from maskset.conversion.class_names import used_categories
from maskset.conversion.keys import (
    PROPOSALS,
    Rule,
    count,
    prefix_rules,
    rename,
    rename_proposal_class_head,
    require,
    resnet_name,
    transformer_settings,
)
from maskset.errors import ConversionError
from maskset.masks.heads.instance_transformer import parameter_count
from maskset.systems.base import BackboneConfig
from maskset.systems.soit import SoitConfig

categories = used_categories  # what the class channels stand for
_TRANSFORMER = {"mask_trans": "mask_projection", "mask_trans_norm": "mask_norm", **PROPOSALS}
_HEADS = {
    "cls_branches": "class_heads",
    **{f"reg_branches.#.{2 * i}": f"box_heads.#.layers.{i}" for i in range(3)},
    **{f"seg_branches.#.{2 * i}": f"mask_head.layers.{i}" for i in range(3)},  # one module, listed for each layer
}
RULES: list[Rule] = [
    *mmdet.RULES,
    *prefix_rules(mmdet.ENCODER_LAYER, f"{mmdet.TRANSFORMER}seg_encoder.layers.#.", "mask_encoder.layers.#."),
    *prefix_rules(_TRANSFORMER, mmdet.TRANSFORMER),
    *prefix_rules(_HEADS, "bbox_head."),
]


def convert(state: Mapping[str, Tensor], use_last_copy: bool = False) -> tuple[SoitConfig, dict[str, Tensor]]:
    """Return the settings of an official model, read from the shapes of its state dict, and our state dict.

    Raises:
        ConversionError: an entry is unknown or missing, or the copies of the mask head differ and not `use_last_copy`.
    """
    ours = rename(state, RULES, use_last_copy)
    settings = transformer_settings(ours)
    numbers, channels = (
        require(ours, "mask_head.layers.2.weight", 2).shape[0],
        require(ours, "mask_projection.weight", 2).shape[0],
    )
    config = SoitConfig(
        **settings,
        backbone=BackboneConfig(name=resnet_name(ours)),
        num_classes=require(ours, "class_heads.0.weight", 2).shape[0],
        mask_encoder_layers=count(ours, r"mask_encoder\.layers\.(\d+)\."),
        mask_channels=channels,
        mask_heads=_mask_heads(numbers, channels),
        mask_loss_layers=settings["decoder_layers"],
    )
    return config, rename_proposal_class_head(ours, config.decoder_layers)


def _mask_heads(numbers: int, channels: int) -> int:
    """Return M, the number of heads that gives this number of mask weights; all official models have 4 points."""
    for heads in range(1, channels + 1):
        if parameter_count(channels, heads, points=4) == numbers:
            return heads
    raise ConversionError(f"{numbers} mask weights do not match any number of heads with {channels} channels and 4 points.")
