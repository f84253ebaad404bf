"""Recipes for Sextant: small ones for few cores, and one for GPUs."""

from dataclasses import replace

from maskset.recipe import DataConfig, Recipe, TrainConfig
from maskset.recipes.backbones import small_backbone
from maskset.systems.sextant import SextantConfig


def sextant_small() -> Recipe:
    """A small Sextant for small data of your own, on few cores or one GPU. The first recipe to try.

    Command: maskset train sextant-small --data FOLDER --out RUN
    Expect: TODO
    Status: TODO
    """
    backbone, input = small_backbone()
    return Recipe(
        model=SextantConfig(
            input=replace(input, divisor=32, short_side=256, long_side=384), backbone=backbone, hidden_dim=64, mask_size=20
        ),
        data=DataConfig(augmentation="flip", short_sides=(224, 256, 288), long_side=384),
        train=TrainConfig(
            epochs=20,
            batch_size=4,
            reference_batch_size=4,
            learning_rate=2e-3,
            backbone_learning_rate=8e-4,
            schedule="cosine",
            warmup_steps=50,
            clip_norm=1.0,
            evaluate_every=2,
            max_detections=300,
        ),
    )


def sextant_tiny() -> Recipe:
    """A very small Sextant from scratch for generated shapes: the recipe of `make demo`.

    Command: maskset train sextant-tiny --data shapes: --out RUN
    Expect: TODO
    Status: TODO
    """
    small = sextant_small()
    return replace(
        small,
        model=replace(small.model, input=replace(small.model.input, short_side=96, long_side=160), num_queries=50),
        data=DataConfig(augmentation="flip", short_sides=(96,), long_side=160, workers=1),
        train=replace(small.train, epochs=4, batch_size=8, reference_batch_size=8, max_detections=100, log_every=50),
    )
