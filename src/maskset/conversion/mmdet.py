"""mmdetection's names for the parts of a deformable transformer, for SOIT, ISDA and Deformable DETR."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from maskset.conversion.keys import ATTENTION, NUM_HEADS, Rule, count, need, resnet_name
from maskset.systems.base import BackboneConfig


def encoder_layer(old: str, new: str) -> list[Rule]:
    """Return the rules of an encoder layer, given patterns of its official and its own name."""
    return [
        *[(rf"{old}\.attentions\.0\.{a}\.(weight|bias)", rf"{new}.attention.{b}.\2") for a, b in ATTENTION.items()],
        (rf"{old}\.norms\.0\.(weight|bias)", rf"{new}.norm.\2"),
        *_feed_forward(old, new, norm=1),
    ]


def _feed_forward(old: str, new: str, norm: int) -> list[Rule]:
    return [
        (rf"{old}\.ffns\.0\.layers\.0\.0\.(weight|bias)", rf"{new}.feed_forward.up.\2"),
        (rf"{old}\.ffns\.0\.layers\.1\.(weight|bias)", rf"{new}.feed_forward.down.\2"),
        (rf"{old}\.norms\.{norm}\.(weight|bias)", rf"{new}.feed_forward.norm.\2"),
    ]


_ENCODER = r"bbox_head\.transformer\.encoder\.layers\.(\d+)", r"encoder.layers.\1"
_DECODER = r"bbox_head\.transformer\.decoder\.layers\.(\d+)", r"decoder.\1"

RULES: list[Rule] = [
    (r"backbone\.(.*)\.num_batches_tracked", None),  # frozen batch norm counts nothing
    (r"backbone\.((?:conv|bn|layer)\d.*)", r"backbone.body.\1"),
    (r"neck\.convs\.(\d+)\.conv\.weight", r"project.convolutions.\1.weight"),
    (r"neck\.convs\.(\d+)\.gn\.(weight|bias)", r"project.norms.\1.\2"),
    (r"neck\.extra_convs\.0\.conv\.weight", r"project.convolutions.3.weight"),
    (r"neck\.extra_convs\.0\.gn\.(weight|bias)", r"project.norms.3.\1"),
    (r"bbox_head\.transformer\.level_embeds", r"level_embedding"),
    *encoder_layer(*_ENCODER),
    (rf"{_DECODER[0]}\.attentions\.0\.attn\.(in_proj_weight|in_proj_bias)", rf"{_DECODER[1]}.self_attention.\2"),
    (rf"{_DECODER[0]}\.attentions\.0\.attn\.out_proj\.(weight|bias)", rf"{_DECODER[1]}.self_attention.out_proj.\2"),
    *[
        (rf"{_DECODER[0]}\.attentions\.1\.{a}\.(weight|bias)", rf"{_DECODER[1]}.cross_attention.{b}.\2")
        for a, b in ATTENTION.items()
    ],
    (rf"{_DECODER[0]}\.norms\.0\.(weight|bias)", rf"{_DECODER[1]}.self_norm.\2"),
    (rf"{_DECODER[0]}\.norms\.1\.(weight|bias)", rf"{_DECODER[1]}.cross_norm.\2"),
    *_feed_forward(*_DECODER, norm=2),
]


def transformer_settings(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the settings that the shapes of our state dict say of backbone and transformer.

    Raises:
        ConversionError: the backbone is not a ResNet-50 or ResNet-101, or an entry is missing.
    """
    levels, width = need(state, "level_embedding", 2).shape
    samples = need(state, "encoder.layers.0.attention.attention_weights.weight", 2).shape[0]
    return {
        "backbone": BackboneConfig(name=resnet_name(state)),
        "hidden_dim": width,
        "num_heads": NUM_HEADS,
        "num_levels": levels,
        "num_points": samples // (NUM_HEADS * levels),
        "feedforward_dim": need(state, "encoder.layers.0.feed_forward.up.weight", 2).shape[0],
        "encoder_layers": count(state, r"encoder\.layers\.(\d+)\."),
        "decoder_layers": count(state, r"decoder\.(\d+)\."),
    }
