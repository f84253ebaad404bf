"""The official SOIT checkpoints (hikvision-research/opera), and what their names become."""

from collections.abc import Mapping

from torch import Tensor

from maskset.conversion.coco import used_categories
from maskset.conversion.keys import Rule, need, proposal_class_head, rename
from maskset.conversion.mmdet import RULES as MMDET_RULES
from maskset.conversion.mmdet import encoder_layer, transformer_settings
from maskset.errors import ConversionError
from maskset.masks.heads.instance_transformer import parameter_count
from maskset.systems.soit import SoitConfig

categories = used_categories  # what the class channels stand for
RULES: list[Rule] = [
    *MMDET_RULES,
    *encoder_layer(r"bbox_head\.transformer\.seg_encoder\.layers\.(\d+)", r"mask_encoder.layers.\1"),
    (r"bbox_head\.transformer\.mask_trans\.(weight|bias)", r"mask_projection.\1"),
    (r"bbox_head\.transformer\.mask_trans_norm\.(weight|bias)", r"mask_norm.\1"),
    (r"bbox_head\.transformer\.enc_output\.(weight|bias)", r"proposals.output.\1"),
    (r"bbox_head\.transformer\.enc_output_norm\.(weight|bias)", r"proposals.output_norm.\1"),
    (r"bbox_head\.transformer\.pos_trans\.(weight|bias)", r"proposals.query.\1"),
    (r"bbox_head\.transformer\.pos_trans_norm\.(weight|bias)", r"proposals.query_norm.\1"),
    (r"bbox_head\.cls_branches\.(\d+)\.(weight|bias)", r"class_heads.\1.\2"),
    *[(rf"bbox_head\.reg_branches\.(\d+)\.{2 * i}\.(weight|bias)", rf"box_heads.\1.layers.{i}.\2") for i in range(3)],
    *[(rf"bbox_head\.seg_branches\.\d+\.{2 * i}\.(weight|bias)", rf"mask_head.layers.{i}.\1") for i in range(3)],  # one module
]


def convert(state: Mapping[str, Tensor], last_wins: bool = False) -> tuple[SoitConfig, dict[str, Tensor]]:
    """Return the config that fits an official state dict, read off its shapes, and our state dict.

    Raises:
        ConversionError: an entry is unknown or missing, or the copies of the mask head differ and not `last_wins`.
    """
    ours = rename(state, RULES, last_wins)
    settings = transformer_settings(ours)
    numbers, channels = need(ours, "mask_head.layers.2.weight", 2).shape[0], need(ours, "mask_projection.weight", 2).shape[0]
    layers = {name.split(".")[2] for name in ours if name.startswith("mask_encoder.layers.")}
    config = SoitConfig(
        **settings,
        num_classes=need(ours, "class_heads.0.weight", 2).shape[0],
        mask_encoder_layers=len(layers),
        mask_channels=channels,
        mask_heads=_mask_heads(numbers, channels),
        mask_loss_layers=settings["decoder_layers"],
    )
    return config, proposal_class_head(ours, config.decoder_layers)


def _mask_heads(numbers: int, channels: int) -> int:
    """Return M, which the number of mask weights tells: the official models all have 4 points."""
    for heads in range(1, channels + 1):
        if parameter_count(channels, heads, points=4) == numbers:
            return heads
    raise ConversionError(f"{numbers} mask weights fit no number of heads with {channels} channels and 4 points.")
