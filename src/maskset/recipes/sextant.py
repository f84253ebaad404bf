"""Recipes for Sextant: three for few cores, and one for GPUs."""

from dataclasses import replace

from maskset.recipe import DataConfig, Recipe, TrainConfig
from maskset.recipes.backbones import PRETRAINED, PRETRAINED_INPUT, small_backbone
from maskset.recipes.solq import solq_small, solq_tiny
from maskset.systems.sextant import SextantConfig


def sextant_small() -> Recipe:
    """A small Sextant for small data of your own, on few cores or one GPU: the first recipe to try.

    Command: maskset train sextant-small --data FOLDER --out RUN
    Expect: depends on the data; images are resized to 256 pixels, with at most 300 objects each. It starts from ImageNet weights
    where maskset[pretrained] is installed, else from random ones.
    Status: trained for 20 CPU minutes on 536 microscope images of nuclei (`python -m benchmarks learning`): mask AP 0.58, AP50
    0.88 on 64 other images. Not yet for all its epochs.
    """
    small, (backbone, _) = solq_small(), small_backbone()
    return Recipe(
        model=SextantConfig(input=replace(small.model.input, divisor=32), backbone=backbone),
        data=small.data,
        train=replace(small.train, epochs=30, learning_rate=2e-3, backbone_learning_rate=8e-4),
    )


def sextant_nuclei() -> Recipe:
    """The Sextant that maskset ships as "nuclei", trained on microscope images of nuclei.

    Command: maskset train sextant-nuclei --data NUCLEI --out RUN
    Expect: see src/maskset/models/nuclei.md, beside its weights, which also names the data. About 100 minutes on one CPU core.
    Status: trained to the end.
    """
    small = sextant_small()
    return Recipe(
        model=replace(
            small.model,
            backbone=PRETRAINED,  # also where its ImageNet weights are not installed: --init nuclei needs none
            input=replace(PRETRAINED_INPUT, divisor=32, short_side=512, long_side=1024),
            num_queries=400,
            mask_size=28,
        ),
        data=replace(small.data, augmentation="lsj", jitter_size=256, jitter_scale=(1.2, 3.2)),
        train=replace(small.train, epochs=70, max_detections=400, evaluate_every=5),
    )


def sextant_tiny() -> Recipe:
    """A very small Sextant for generated shapes: the recipe of `make demo`.

    Command: maskset train sextant-tiny --data shapes: --out RUN
    Expect: mask AP 0.79, AP50 0.95 on 200 unseen images (`make demo`), after 3 minutes on two CPU cores, from ImageNet weights.
    From random weights, without maskset[pretrained], classes take far longer.
    Status: trained by `make demo`.
    """
    small, tiny = sextant_small(), solq_tiny()
    input = replace(small.model.input, short_side=96, long_side=160)
    return Recipe(
        model=replace(small.model, input=input, num_queries=50, mask_size=28),
        data=tiny.data,
        train=replace(tiny.train, epochs=3, learning_rate=2e-3, backbone_learning_rate=8e-4),
    )


def sextant_r50() -> Recipe:
    """Sextant with ResNet-50 on COCO, for those with GPUs.

    Command: accelerate launch -m maskset train sextant-r50 --data COCO --out RUN
    Expect: unknown. No Sextant has been trained on COCO, so schedule and learning rates are a guess from those of the others.
    Status: not trained here.
    """
    return Recipe(
        model=SextantConfig(hidden_dim=128, head_layers=3, mask_dim=32, mask_hidden_dim=16, mask_size=28),
        data=DataConfig(augmentation="detr"),
        train=TrainConfig(
            epochs=36,
            batch_size=16,
            reference_batch_size=16,
            learning_rate=5e-4,
            backbone_learning_rate=5e-5,
            schedule="cosine",
            warmup_steps=1000,
            clip_norm=1.0,
            ema_decay=0.9998,
        ),
    )
