"""Recipes for SOLQ: the published ones, and two for small data and few cores."""

from dataclasses import replace
from typing import Any

from maskset.recipe import DataConfig, Recipe, TrainConfig
from maskset.recipes.backbones import SCRATCH, small_backbone
from maskset.systems.base import BackboneConfig, InputConfig
from maskset.systems.solq import SolqConfig

TINY_TRANSFORMER: dict[str, Any] = {
    "hidden_dim": 128,
    "num_heads": 4,
    "num_levels": 3,
    "feedforward_dim": 512,
    "dropout": 0.0,
    "encoder_layers": 1,
    "decoder_layers": 3,
    "num_queries": 30,
}


def solq_r50() -> Recipe:
    """SOLQ with ResNet-50 on COCO.

    Command: accelerate launch -m maskset train solq-r50 --data COCO --out RUN
    Official: configs/r50_solq_train.sh, 8 V100 x 4 images, about 1.5 days (the authors, issue 5).
    Expect: mask AP 40.1 on val2017 (the authors, issue 1); box / mask AP 47.8 / 39.7 on test-dev (official README).
    Status: the network, its losses and gradients are tested against the official code; not trained on COCO here.
    """
    return Recipe(model=SolqConfig())


def solq_r101() -> Recipe:
    """SOLQ with ResNet-101 on COCO.

    Command: accelerate launch -m maskset train solq-r101 --data COCO --out RUN
    Official: configs/r101_solq_train.sh, 16 V100 x 2 images, about 2 days (the authors, issue 5).
    Expect: box / mask AP 48.4 / 40.4 on val2017 (paper, table 2), 48.7 / 40.9 on test-dev (official README).
    Status: as solq-r50 except for the backbone; not trained on COCO here.
    """
    return Recipe(model=SolqConfig(backbone=BackboneConfig(name="resnet101.tv_in1k")))


def solq_swin_t() -> Recipe:
    """SOLQ with Swin-T on COCO, with the input sizes of the ResNets.

    Command: accelerate launch -m maskset train solq-swin-t --data COCO --out RUN
    Expect: no published result; between solq-r50 and solq-swin-l.
    Status: the backbone is tested against the official code; not trained on COCO here.
    """
    return Recipe(model=SolqConfig(backbone=BackboneConfig(name="swin_tiny", frozen_stages=0)))


def solq_swin_l() -> Recipe:
    """SOLQ with Swin-L on COCO, with larger images than the ResNets.

    Command: accelerate launch -m maskset train solq-swin-l --data COCO --out RUN
    Official: no script; the settings are from the authors in issues 19 and 20. 16 V100 x 2 images, nearly 4 days (issue 5).
    Expect: box / mask AP 55.4 / 45.9 on test-dev (official README); 56.5 / 46.7 with long sides up to 1536 pixels.
    Status: of the full-size Swin only names and shapes of the weights are tested; not trained on COCO here. The official
    backbone starts from ImageNet-22k weights fine-tuned on ImageNet-1k at 224 pixels.
    """
    return Recipe(
        model=SolqConfig(
            backbone=BackboneConfig(name="swin_large", frozen_stages=0, drop_path=0.3),
            input=InputConfig(short_side=1088, long_side=1333),
        ),
        data=DataConfig(short_sides=tuple(range(416, 1089, 32))),
    )


def solq_small() -> Recipe:
    """A small SOLQ for small data of your own, on few cores or one GPU.

    Command: maskset train solq-small --data FOLDER --out RUN
    Expect: depends on the data; images are resized to 256 pixels, with at most 300 objects each. It starts from ImageNet weights
    where maskset[pretrained] is installed, else from random ones.
    Status: without maskset[pretrained], trained on a CPU for 8 epochs (--train.epochs 8) on 536 microscope images of nuclei, 24
    minutes: mask AP 0.172, AP50 0.487 on 64 other images. Not yet for all its epochs.
    """
    tiny, (backbone, input) = solq_tiny(), small_backbone()
    input = replace(input, short_side=256, long_side=384)
    return Recipe(
        model=replace(tiny.model, input=input, backbone=backbone, num_queries=300),
        data=DataConfig(augmentation="flip", short_sides=(224, 256, 288), long_side=384),
        train=replace(tiny.train, epochs=50, batch_size=4, reference_batch_size=4, max_detections=300),
    )


def solq_tiny() -> Recipe:
    """A very small SOLQ from scratch for generated shapes.

    Command: maskset train solq-tiny --data shapes: --out RUN
    Expect: mask AP 0.35, AP50 0.69 on 200 unseen images, after 9 minutes on two CPU cores.
    Status: trained to the end; with so little time, many steps of few small images beat fewer steps of larger ones.
    """
    return Recipe(
        model=SolqConfig(
            input=InputConfig(short_side=96, long_side=160),
            backbone=SCRATCH,
            **TINY_TRANSFORMER,
            mask_size=32,
            code_length=64,
            mask_hidden_dim=256,
            mask_loss_layers=3,
        ),
        data=DataConfig(augmentation="flip", short_sides=(96,), long_side=160, workers=1),
        train=TrainConfig(
            epochs=7,
            batch_size=8,
            reference_batch_size=8,
            learning_rate=4e-4,
            backbone_learning_rate=4e-4,
            offset_learning_rate=4e-4,
            schedule="cosine",
            warmup_steps=50,
            clip_norm=1.0,
            evaluate_every=2,
            log_every=50,
        ),
    )
