"""The official SOLQ checkpoints (megvii-research/SOLQ), and what their names become."""

from collections.abc import Mapping

from torch import Tensor

from maskset.conversion.backbones import SWIN_RULES
from maskset.conversion.coco import raw_categories
from maskset.conversion.keys import ATTENTION, NUM_HEADS, RESNETS, Rule, count, need, proposal_class_head, rename
from maskset.errors import ConversionError
from maskset.systems.base import BackboneConfig, InputConfig
from maskset.systems.solq import SolqConfig

categories = raw_categories  # what the class channels stand for

RULES: list[Rule] = [
    (r"backbone\.0\.body\.(.*)\.num_batches_tracked", None),  # frozen batch norm counts nothing
    (r"backbone\.0\.body\.((?:conv|bn|layer)\d.*)", r"backbone.body.\1"),  # ResNet: torchvision's names and ours are timm's
    *[(rf"backbone\.0\.body\.{old}", None if new is None else f"backbone.body.{new}") for old, new in SWIN_RULES],
    (r"input_proj\.(\d+)\.0\.(weight|bias)", r"project.convolutions.\1.\2"),
    (r"input_proj\.(\d+)\.1\.(weight|bias)", r"project.norms.\1.\2"),
    (r"transformer\.level_embed", r"level_embedding"),
    *[
        (rf"transformer\.encoder\.layers\.(\d+)\.self_attn\.{old}\.(weight|bias)", rf"encoder.layers.\1.attention.{new}.\2")
        for old, new in ATTENTION.items()
    ],
    (r"transformer\.encoder\.layers\.(\d+)\.norm1\.(weight|bias)", r"encoder.layers.\1.norm.\2"),
    (r"transformer\.encoder\.layers\.(\d+)\.linear1\.(weight|bias)", r"encoder.layers.\1.feed_forward.up.\2"),
    (r"transformer\.encoder\.layers\.(\d+)\.linear2\.(weight|bias)", r"encoder.layers.\1.feed_forward.down.\2"),
    (r"transformer\.encoder\.layers\.(\d+)\.norm2\.(weight|bias)", r"encoder.layers.\1.feed_forward.norm.\2"),
    *[
        (rf"transformer\.decoder\.layers\.(\d+)\.cross_attn\.{old}\.(weight|bias)", rf"decoder.\1.cross_attention.{new}.\2")
        for old, new in ATTENTION.items()
    ],
    (r"transformer\.decoder\.layers\.(\d+)\.norm1\.(weight|bias)", r"decoder.\1.cross_norm.\2"),
    (r"transformer\.decoder\.layers\.(\d+)\.self_attn\.(in_proj_weight|in_proj_bias)", r"decoder.\1.self_attention.\2"),
    (r"transformer\.decoder\.layers\.(\d+)\.self_attn\.out_proj\.(weight|bias)", r"decoder.\1.self_attention.out_proj.\2"),
    (r"transformer\.decoder\.layers\.(\d+)\.norm2\.(weight|bias)", r"decoder.\1.self_norm.\2"),
    (r"transformer\.decoder\.layers\.(\d+)\.linear1\.(weight|bias)", r"decoder.\1.feed_forward.up.\2"),
    (r"transformer\.decoder\.layers\.(\d+)\.linear2\.(weight|bias)", r"decoder.\1.feed_forward.down.\2"),
    (r"transformer\.decoder\.layers\.(\d+)\.norm3\.(weight|bias)", r"decoder.\1.feed_forward.norm.\2"),
    (r"transformer\.reference_points\.(weight|bias)", r"reference_points.\1"),
    (r"query_embed\.weight", r"query"),  # split below
    # The decoder keeps the box heads (and with two stages the class heads) once more: aliases
    (r"(?:transformer\.decoder\.)?class_embed\.(\d+)\.(weight|bias)", r"class_heads.\1.\2"),
    (r"(?:transformer\.decoder\.)?bbox_embed\.(\d+)\.layers\.(\d+)\.(weight|bias)", r"box_heads.\1.layers.\2.\3"),
    (r"vector_embed\.\d+\.layers\.(\d+)\.(weight|bias)", r"mask_head.layers.\1.\2"),  # one module, listed for each layer
    (r"transformer\.enc_output\.(weight|bias)", r"proposals.output.\1"),
    (r"transformer\.enc_output_norm\.(weight|bias)", r"proposals.output_norm.\1"),
    (r"transformer\.pos_trans\.(weight|bias)", r"proposals.query.\1"),
    (r"transformer\.pos_trans_norm\.(weight|bias)", r"proposals.query_norm.\1"),
]


def convert(state: Mapping[str, Tensor], last_wins: bool = False) -> tuple[SolqConfig, dict[str, Tensor]]:
    """Return the config that fits an official state dict, read off its shapes, and our state dict.

    Raises:
        ConversionError: an entry is unknown or missing, or aliases differ and not `last_wins`.
    """
    ours = rename(state, RULES, last_wins)
    config = _config(ours)
    if config.two_stage:
        return config, proposal_class_head(ours, config.decoder_layers)
    position, content = need(ours, "query", 2).chunk(2, dim=1)
    del ours["query"]
    return config, ours | {"query_position": position.contiguous(), "query_content": content.contiguous()}


def _config(state: Mapping[str, Tensor]) -> SolqConfig:
    levels, width = need(state, "level_embedding", 2).shape
    samples = need(state, "encoder.layers.0.attention.attention_weights.weight", 2).shape[0]
    decoder_layers = count(state, r"decoder\.(\d+)\.")
    classes = need(state, "class_heads.0.weight", 2).shape[0]
    two_stage = "proposals.output.weight" in state
    backbone, input = _backbone(state)
    return SolqConfig(
        num_classes=classes,
        input=input,
        backbone=BackboneConfig(name=backbone, drop_path={"swin_base": 0.3, "swin_large": 0.3}.get(backbone, 0.2)),
        hidden_dim=width,
        num_heads=NUM_HEADS,
        num_levels=levels,
        num_points=samples // (NUM_HEADS * levels),
        feedforward_dim=need(state, "encoder.layers.0.feed_forward.up.weight", 2).shape[0],
        encoder_layers=count(state, r"encoder\.layers\.(\d+)\."),
        decoder_layers=decoder_layers,
        num_queries=300 if two_stage else need(state, "query", 2).shape[0],  # proposals have no embedding to count
        box_refinement=count(state, r"box_heads\.(\d+)\.") > 1,
        two_stage=two_stage,
        code_length=need(state, "mask_head.layers.2.weight", 2).shape[0],
        mask_hidden_dim=need(state, "mask_head.layers.0.weight", 2).shape[0],
        mask_loss_layers=decoder_layers,
    )


def _backbone(state: Mapping[str, Tensor]) -> tuple[str, InputConfig]:
    """Return which backbone it is, and the size of the test images that it was published with (README, issue 19)."""
    swins = {(96, 6): "swin_tiny", (96, 18): "swin_small", (128, 18): "swin_base", (192, 18): "swin_large"}
    embedding = state.get("backbone.body.patches.projection.weight")
    if embedding is not None:
        depth = count(state, r"backbone\.body\.stages\.2\.blocks\.(\d+)\.")
        if (embedding.shape[0], depth) in swins:
            return swins[embedding.shape[0], depth], InputConfig(short_side=1088, long_side=1333)
    blocks = count(state, r"backbone\.body\.layer3\.(\d+)\.")
    if blocks in RESNETS:
        return RESNETS[blocks], InputConfig()
    raise ConversionError(f"the backbone is none of {', '.join([*RESNETS.values(), *swins.values()])}.")
