"""The backbone of small recipes, which depends on what is installed."""

from importlib.util import find_spec

from maskset.systems.base import PACKAGED_WEIGHTS, BackboneConfig, InputConfig

SCRATCH = BackboneConfig(name="resnet10t", norm="group", frozen_stages=0, pretrained=False)
PRETRAINED = BackboneConfig(name="tf_efficientnet_lite0", frozen_stages=0)
PRETRAINED_INPUT = InputConfig(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))  # what its weights were trained with


def small_backbone() -> tuple[BackboneConfig, InputConfig]:
    """Return the backbone of a small recipe, and an input that is normalized as its weights need.

    With maskset[pretrained] it is EfficientNet-Lite0 from ImageNet weights, which needs no download; without, it is a small
    ResNet from random weights, so that the recipe runs everywhere. A run stores which one it has in its recipe.json.
    """
    if find_spec(PACKAGED_WEIGHTS[PRETRAINED.name]) is None:
        return SCRATCH, InputConfig()
    return PRETRAINED, PRETRAINED_INPUT
