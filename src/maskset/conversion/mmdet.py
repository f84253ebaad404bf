"""mmdetection's names for the parts of a deformable transformer, for SOIT, ISDA and Deformable DETR."""

from maskset.conversion.keys import Rule, prefix_rules

_FEED_FORWARD = {"ffns.0.layers.0.0": "feed_forward.up", "ffns.0.layers.1": "feed_forward.down"}
ENCODER_LAYER = {
    "attentions.0.value_proj": "attention.value_projection",
    "attentions.0.output_proj": "attention.output_projection",
    "attentions.0": "attention",
    "norms.0": "norm",
    **_FEED_FORWARD,
    "norms.1": "feed_forward.norm",
}
_DECODER_LAYER = {
    "attentions.0.attn": "self_attention",
    "attentions.1.value_proj": "cross_attention.value_projection",
    "attentions.1.output_proj": "cross_attention.output_projection",
    "attentions.1": "cross_attention",
    "norms.0": "self_norm",
    "norms.1": "cross_norm",
    **_FEED_FORWARD,
    "norms.2": "feed_forward.norm",
}
_NECK = {
    "convs.#.conv": "convolutions.#",
    "convs.#.gn": "norms.#",
    "extra_convs.0.conv": "convolutions.3",
    "extra_convs.0.gn": "norms.3",
}
TRANSFORMER = "bbox_head.transformer."
RULES: list[Rule] = [
    (r"backbone\.(.*)\.num_batches_tracked", None),  # frozen batch norms do not count batches
    (r"backbone\.((?:conv|bn|layer)\d.*)", r"backbone.body.\1"),
    *prefix_rules(_NECK, "neck.", "project."),
    *prefix_rules({"level_embeds": "level_embedding"}, TRANSFORMER),
    *prefix_rules(ENCODER_LAYER, f"{TRANSFORMER}encoder.layers.#.", "encoder.layers.#."),
    *prefix_rules(_DECODER_LAYER, f"{TRANSFORMER}decoder.layers.#.", "decoder.#."),
]
