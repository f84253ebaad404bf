"""The official SOLQ checkpoints (megvii-research/SOLQ), and the rules that rename their entries."""

from collections.abc import Mapping

from torch import Tensor

from maskset.conversion.backbones import SWIN_RULES
from maskset.conversion.class_names import raw_categories
from maskset.conversion.keys import (
    PROPOSALS,
    Rule,
    count,
    prefix_rules,
    rename,
    rename_proposal_class_head,
    require,
    resnet_name,
    split_queries,
    transformer_settings,
)
from maskset.systems.base import BackboneConfig, InputConfig
from maskset.systems.solq import SolqConfig

categories = raw_categories  # what the class channels stand for

_ENCODER_LAYER = {
    "self_attn.value_proj": "attention.value_projection",
    "self_attn.output_proj": "attention.output_projection",
    "self_attn": "attention",
    "norm1": "norm",
    "linear1": "feed_forward.up",
    "linear2": "feed_forward.down",
    "norm2": "feed_forward.norm",
}
_DECODER_LAYER = {
    "cross_attn.value_proj": "cross_attention.value_projection",
    "cross_attn.output_proj": "cross_attention.output_projection",
    "cross_attn": "cross_attention",
    "norm1": "cross_norm",
    "self_attn": "self_attention",
    "norm2": "self_norm",
    "linear1": "feed_forward.up",
    "linear2": "feed_forward.down",
    "norm3": "feed_forward.norm",
}
_HEADS = {"class_embed": "class_heads", "bbox_embed": "box_heads"}
_OTHERS = {
    "input_proj.#.0": "project.convolutions.#",
    "input_proj.#.1": "project.norms.#",
    "query_embed.weight": "query",  # split below
    "vector_embed.#": "mask_head",  # one module, listed for each layer
}
RULES: list[Rule] = [
    (r"backbone\.0\.body\.(.*)\.num_batches_tracked", None),  # frozen batch norms do not count batches
    (r"backbone\.0\.body\.((?:conv|bn|layer)\d.*)", r"backbone.body.\1"),  # ResNet: torchvision's names and ours are timm's
    *[(rf"backbone\.0\.body\.{old}", None if new is None else f"backbone.body.{new}") for old, new in SWIN_RULES],
    *prefix_rules(_ENCODER_LAYER, "transformer.encoder.layers.#.", "encoder.layers.#."),
    *prefix_rules(_DECODER_LAYER, "transformer.decoder.layers.#.", "decoder.#."),
    *prefix_rules({"level_embed": "level_embedding", "reference_points": "reference_points", **PROPOSALS}, "transformer."),
    *prefix_rules(_HEADS),
    *prefix_rules(_HEADS, "transformer.decoder."),  # copies of the box heads, and with two stages of the class heads
    *prefix_rules(_OTHERS),
]


def convert(state: Mapping[str, Tensor], use_last_copy: bool = False) -> tuple[SolqConfig, dict[str, Tensor]]:
    """Return the settings of an official model, read from the shapes of its state dict, and our state dict.

    Raises:
        ConversionError: an entry is unknown or missing, or copies differ and not `use_last_copy`.
    """
    ours = rename(state, RULES, use_last_copy)
    settings = transformer_settings(ours)
    two_stage = "proposals.output.weight" in ours
    ours = rename_proposal_class_head(ours, settings["decoder_layers"]) if two_stage else split_queries(ours)
    backbone, input = _backbone(ours)
    config = SolqConfig(
        **settings,
        num_classes=require(ours, "class_heads.0.weight", 2).shape[0],
        input=input,
        backbone=BackboneConfig(name=backbone, drop_path={"swin_base": 0.3, "swin_large": 0.3}.get(backbone, 0.2)),
        num_queries=300 if two_stage else len(ours["query_position"]),  # with two stages there are no query embeddings to count
        box_refinement=count(ours, r"box_heads\.(\d+)\.") > 1,
        two_stage=two_stage,
        code_length=require(ours, "mask_head.layers.2.weight", 2).shape[0],
        mask_hidden_dim=require(ours, "mask_head.layers.0.weight", 2).shape[0],
        mask_loss_layers=settings["decoder_layers"],
    )
    return config, ours


def _backbone(state: Mapping[str, Tensor]) -> tuple[str, InputConfig]:
    """Return the name of the backbone, and the image size of its published results (README, issue 19)."""
    swins = {(96, 6): "swin_tiny", (96, 18): "swin_small", (128, 18): "swin_base", (192, 18): "swin_large"}
    embedding = state.get("backbone.body.patches.projection.weight")
    if embedding is not None:
        depth = count(state, r"backbone\.body\.stages\.2\.blocks\.(\d+)\.")
        if (embedding.shape[0], depth) in swins:
            return swins[embedding.shape[0], depth], InputConfig(short_side=1088, long_side=1333)
    return resnet_name(state, alternatives=list(swins.values())), InputConfig()
