"""The official layout of ISDA's checkpoints (yingkaining/isda), and what its names become."""

from collections.abc import Mapping

from torch import Tensor

from maskset.conversion import mmdet
from maskset.conversion.coco import used_categories
from maskset.conversion.keys import Rule, need, rename
from maskset.systems.isda import IsdaConfig

categories = used_categories  # what the class channels stand for
_HEAD = r"mask_feat_head\.convs_all_levels\.(\d+)\.conv(\d+)"
RULES: list[Rule] = [
    *mmdet.RULES,
    (r"neck\.first_conv\.conv\.weight", r"project_finest.convolutions.0.weight"),
    (r"neck\.first_conv\.gn\.(weight|bias)", r"project_finest.norms.0.\1"),
    (rf"{_HEAD}\.conv\.weight", r"mask_feature_head.branches.\1.\2.convolution.weight"),
    (rf"{_HEAD}\.gn\.(weight|bias)", r"mask_feature_head.branches.\1.\2.norm.\3"),
    (r"mask_feat_head\.conv_pred\.0\.conv\.weight", r"mask_feature_head.output.convolution.weight"),
    (r"mask_feat_head\.conv_pred\.0\.gn\.(weight|bias)", r"mask_feature_head.output.norm.\1"),
    (r"bbox_head\.transformer\.reference_points\.(weight|bias)", r"reference_points.\1"),
    (r"bbox_head\.query_embedding\.weight", r"query"),  # split below
    # One module each, listed once for every decoder layer
    (r"bbox_head\.cls_branches\.\d+\.(weight|bias)", r"class_head.\1"),
    *[(rf"bbox_head\.kernel_branches\.\d+\.{2 * i}\.(weight|bias)", rf"kernel_head.layers.{i}.\1") for i in range(3)],
]


def convert(state: Mapping[str, Tensor], last_wins: bool = False) -> tuple[IsdaConfig, dict[str, Tensor]]:
    """Return the config that fits an official state dict, read off its shapes, and our state dict.

    Raises:
        ConversionError: an entry is unknown or missing, or aliases differ and not `last_wins`.
    """
    ours = rename(state, RULES, last_wins)
    position, content = need(ours, "query", 2).chunk(2, dim=1)
    del ours["query"]
    return _config(ours, len(position)), ours | {"query_position": position.contiguous(), "query_content": content.contiguous()}


def _config(state: Mapping[str, Tensor], num_queries: int) -> IsdaConfig:
    hidden, width = need(state, "mask_feature_head.branches.3.0.convolution.weight", 4).shape[:2]
    mask_dim = need(state, "mask_feature_head.output.convolution.weight", 4).shape[0]
    settings = mmdet.transformer_settings(state)
    return IsdaConfig(
        **settings,
        num_classes=need(state, "class_head.weight", 2).shape[0],
        num_queries=num_queries,
        mask_hidden_dim=hidden,
        mask_dim=mask_dim,
        feature_coordinates=width > settings["hidden_dim"],
        kernel_position=need(state, "kernel_head.layers.2.weight", 2).shape[0] < mask_dim,
    )
