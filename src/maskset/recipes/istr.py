"""Recipes for ISTR and ISTR-SMT: the published ones, and two ISTRs for small data and few cores."""

from dataclasses import replace

from maskset.recipe import DataConfig, Recipe, TrainConfig
from maskset.recipes.backbones import SCRATCH
from maskset.recipes.solq import solq_small, solq_tiny
from maskset.systems.base import BackboneConfig, InputConfig
from maskset.systems.istr import IstrConfig
from maskset.systems.istr_smt import IstrSmtConfig


def istr_r50() -> Recipe:
    """ISTR with ResNet-50 on COCO: the paper's model.

    Command: accelerate launch -m maskset train istr-r50 --data COCO --out RUN
    Official: ISTR-R50-3x.yaml of May 2021, 16 images on 8 GPUs (paper) or 4 (README). 270,000 steps, 36.8 epochs; the learning
    rate drops after 210,000 and 250,000. The paper has 36 epochs, with drops after 27 and 33. Ablations: --train.epochs 12
    --train.drop-epochs 9 11 --train.steps none. All weights have the learning rate of the backbone.
    Start: torchvision's first ResNet-50, in detectron2 ImageNetPretrained/torchvision/R-50.pkl, is timm's tv_in1k. The mask codec
    is fitted to the first 20,000 masks before the first step; officially to all masks: `maskset codecs fit logit-pca COCO CODEC
    --max-masks 900000` and --model.codec-weights CODEC.
    Expect: box / mask AP 46.8 / 38.6 on test-dev (paper, table 2); mask AP 34.2 on val2017 after 12 epochs (table 1).
    Status: the network, its losses and gradients are tested against the official code; not trained on COCO here. Warm-up is from
    0.001 instead of 0.01 of the learning rate.
    """
    return Recipe(
        model=IstrConfig(),
        data=DataConfig(augmentation="mmdet", crop_fraction=0.7),
        train=TrainConfig(
            epochs=27,  # drops at 21 and 25 of 27 epochs are drops at 210,000 and 250,000 of 270,000 steps
            steps=270_000,
            drop_epochs=(21, 25),
            batch_size=16,
            reference_batch_size=16,
            learning_rate=2.5e-5,
            backbone_learning_rate=2.5e-5,
            offset_learning_rate=2.5e-5,
            warmup_steps=1000,
            clip_norm=1.0,
        ),
    )


def istr_r101() -> Recipe:
    """ISTR with ResNet-101 on COCO.

    Command: accelerate launch -m maskset train istr-r101 --data COCO --out RUN
    Official: ISTR-R101-3x.yaml of May 2021; otherwise as istr-r50.
    Expect: box / mask AP 48.1 / 39.9 on test-dev (paper, table 2).
    Status: as istr-r50 except for the backbone; not trained on COCO here.
    """
    recipe = istr_r50()
    return replace(recipe, model=replace(recipe.model, backbone=BackboneConfig(name="resnet101.tv_in1k")))


def istr_small() -> Recipe:
    """A small ISTR for small data of your own, on few cores or one GPU; all but the system is as in solq-small.

    Command: maskset train istr-small --data FOLDER --out RUN
    Expect: depends on the data; images are resized to 256 pixels, with at most 300 objects each.
    Status: not yet trained to the end.
    """
    small = solq_small()
    input = replace(small.model.input, divisor=32)
    return replace(small, model=replace(istr_tiny().model, input=input, backbone=small.model.backbone, num_queries=300))


def istr_tiny() -> Recipe:
    """A very small ISTR from scratch for generated shapes.

    Command: maskset train istr-tiny --data shapes: --out RUN
    Expect: mask AP 0.05, AP50 0.14 on the 200 images of shapes' val after 500 of its 1,750 steps, 4 minutes of one CPU core
    (`maskset compare`, benchmarks/results/compare_cpu.json).
    Status: the data and the schedule of solq-tiny; not yet trained to the end.
    """
    return replace(
        solq_tiny(),
        model=IstrConfig(
            input=InputConfig(short_side=96, long_side=160, divisor=32),
            backbone=SCRATCH,
            hidden_dim=80,
            masked_pooling=True,
            num_queries=30,
            stages=3,
            num_heads=4,
            dynamic_dim=32,
            feedforward_dim=512,
            code_length=40,
        ),
    )


def istr_smt_r50() -> Recipe:
    """ISTR-SMT with ResNet-50 on COCO: the official code of 2022.

    Command: accelerate launch -m maskset train istr-smt-r50 --data COCO --out RUN
    Official: ISTR-AE-R50-3x.yaml of March 2022; the schedule is that of istr-r50, images are larger, the crop is of 384 to 600
    pixels, and only the batch norms of the backbone are frozen. --model.codec dct or logit-pca is the official DCT or PCA.
    Autoencoder: officially fitted to all masks in 30 epochs of batches of 1024. Here it is fitted before the first step, to the
    first 20,000 masks in 3000 batches (--model.autoencoder-steps) of 64, which takes hours on a CPU. `maskset codecs fit
    autoencoder` with --model.codec-weights fits it once for several runs.
    Expect: box / mask AP 47.4 / 41.7 (official README, which does not name the data set; PCA 46.7 / 39.8, DCT 46.9 / 40.2).
    Status: the network and its losses are tested against the official code; not trained on COCO here.
    """
    recipe = istr_r50()
    return replace(
        recipe,
        model=IstrSmtConfig(),
        data=DataConfig(augmentation="mmdet", short_sides=tuple(range(416, 1089, 32))),
    )


def istr_smt_r101() -> Recipe:
    """ISTR-SMT with ResNet-101 on COCO.

    Command: accelerate launch -m maskset train istr-smt-r101 --data COCO --out RUN
    Official: ISTR-AE-R101-3x.yaml of March 2022; otherwise as istr-smt-r50.
    Expect: box / mask AP 48.8 / 42.9 (official README; PCA 48.0 / 41.1, DCT 48.3 / 41.6).
    Status: as istr-smt-r50 except for the backbone; not trained on COCO here.
    """
    recipe = istr_smt_r50()
    return replace(recipe, model=replace(recipe.model, backbone=BackboneConfig(name="resnet101.tv_in1k", frozen_stages=0)))
