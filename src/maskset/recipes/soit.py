"""Recipes for SOIT: the published ones, and two for small data and few cores."""

from dataclasses import replace

from maskset.recipe import DataConfig, Recipe
from maskset.recipes.backbones import SCRATCH
from maskset.recipes.solq import TINY_TRANSFORMER, solq_small, solq_tiny
from maskset.systems.base import BackboneConfig
from maskset.systems.soit import SoitConfig

_DATA = DataConfig(augmentation="mmdet")  # official; the paper does not mention crops


def soit_r50() -> Recipe:
    """SOIT with ResNet-50 on COCO.

    Command: accelerate launch -m maskset train soit-r50 --data COCO --out RUN
    Official: soit_r50_16x2_50e_coco of Opera, 16 V100 x 2 images, 50 epochs. The paper says Adam, the code has AdamW; the paper
    says multi-scale images, the code also crops.
    Expect: mask / box AP 42.2 / 48.9 on val2017 (Opera's README), 42.5 / 49.1 on test-dev (paper, table 1).
    Status: the network, its losses and gradients are tested against the official code; not trained on COCO here.
    """
    return Recipe(model=SoitConfig(), data=_DATA)


def soit_r101() -> Recipe:
    """SOIT with ResNet-101 on COCO.

    Command: accelerate launch -m maskset train soit-r101 --data COCO --out RUN
    Official: soit_r101_16x2_50e_coco of Opera, 16 V100 x 2 images, 50 epochs.
    Expect: mask / box AP 42.9 / 49.5 on val2017 (Opera's README), 43.4 / 50.0 on test-dev (paper, table 1).
    Status: as soit-r50 except for the backbone; not trained on COCO here.
    """
    return Recipe(model=SoitConfig(backbone=BackboneConfig(name="resnet101.tv_in1k")), data=_DATA)


def soit_swin_l() -> Recipe:
    """SOIT with Swin-L on COCO.

    Command: accelerate launch -m maskset train soit-swin-l --data COCO --out RUN
    Official: neither settings nor weights are published; these are soit-r50's with SOLQ's drop path and no frozen stages.
    Expect: mask / box AP 49.2 / 56.9 on test-dev (paper, table 1), if the unpublished settings were like these.
    Status: the backbone is tested against another system's official code; not trained on COCO here.
    """
    return Recipe(model=SoitConfig(backbone=BackboneConfig(name="swin_large", frozen_stages=0, drop_path=0.3)), data=_DATA)


def soit_small() -> Recipe:
    """A small SOIT for small data of your own, on few cores or one GPU; all but the system is as in solq-small.

    Command: maskset train soit-small --data FOLDER --out RUN
    Expect: depends on the data; images are resized to 256 pixels, with at most 300 objects each.
    Status: without maskset[pretrained], trained on a CPU for 3 epochs on 536 microscope images of nuclei, 37 minutes: mask AP
    0.079, AP50 0.240 on 64 other images (`maskset compare`, benchmarks/results/compare_cpu.json). Not yet for all its epochs.
    """
    small = solq_small()
    model = replace(soit_tiny().model, input=small.model.input, backbone=small.model.backbone, num_queries=300)
    return replace(small, model=model)


def soit_tiny() -> Recipe:
    """A very small SOIT from scratch for generated shapes; data and schedule are solq-tiny's.

    Command: maskset train soit-tiny --data shapes: --out RUN
    Expect: mask AP 0.64, AP50 0.86 on the 200 images of shapes' val, after 13 minutes of one CPU core.
    Status: trained to the end on a CPU; masks are coarse, since a map of 96 pixels has 12 x 12 cells at stride 8.
    """
    tiny = solq_tiny()
    return replace(
        tiny,
        model=SoitConfig(
            input=tiny.model.input,
            backbone=SCRATCH,
            **TINY_TRANSFORMER,
            mask_loss_layers=3,
            class_weight=4.0,  # masks are learned sooner than classes, which lag far behind with the published weights
            dice_weight=2.0,
        ),
    )
