"""Recipes for SOTR: the published ones, the real-time one, and two for small data and few cores."""

from dataclasses import replace

from maskset.recipe import DataConfig, Recipe, TrainConfig
from maskset.recipes.backbones import SCRATCH
from maskset.recipes.solq import solq_small, solq_tiny
from maskset.systems.base import InputConfig
from maskset.systems.sotr import SotrConfig

_SHORT_SIDES = tuple(range(640, 801, 32))
_RESNET101 = replace(SotrConfig().backbone, name="resnet101.tv_in1k")


def sotr_r50() -> Recipe:
    """SOTR with ResNet-50 on COCO.

    Command: accelerate launch -m maskset train sotr-r50 --data COCO --out RUN --model.backbone.weights R-50.pkl
    Official: configs/SOTR/R50.yaml, 4 GPUs x 2 images, 300,000 steps (about 20 epochs). The ResNet starts from detectron2's
    ImageNetPretrained/MSRA/R-50.pkl. With --model.backbone.stride-in-first false, and the mean, std and channel order
    of other recipes in --model.input, it can start from timm's hub.
    Schedule: 1,000 steps of warm-up, linear (the paper says constant); divided by 10 after 210,000 and 250,000 steps.
    Expect: mask AP 39.6, AP50 60.7, AP75 42.6 on COCO (official README, with these sizes); 37.5 on test-dev (paper, table 1).
    Status: the network, its losses, gradients and results are tested against the official code; not trained on COCO here. The
    official code skips images without objects; here they count as background.
    """
    return Recipe(
        model=SotrConfig(),
        data=DataConfig(augmentation="flip", short_sides=(*_SHORT_SIDES, 1024), long_side=2048),
        train=TrainConfig(
            epochs=30,  # only sets the fractions at which the learning rate drops: a run has 300,000 steps
            steps=300_000,
            drop_epochs=(21, 25),
            batch_size=8,
            reference_batch_size=8,
            optimizer="sgd",
            learning_rate=0.01,
            backbone_learning_rate=0.01,
            warmup_steps=1000,
            clip_norm=0.0,
        ),
    )


def sotr_r101() -> Recipe:
    """SOTR with ResNet-101 on COCO.

    Command: accelerate launch -m maskset train sotr-r101 --data COCO --out RUN --model.backbone.weights R-101.pkl
    Official: configs/SOTR/R101.yaml. Images are smaller than those of the two other models, in training and in testing.
    Expect: mask AP 40.2, AP50 61.2, AP75 43.4 on COCO (official README); 40.2 on test-dev (paper, table 7), after 3 to 4 days on
    four V100.
    Status: tested with ResNet-50; not trained on COCO here.
    """
    base = sotr_r50()
    return replace(
        base,
        model=replace(
            base.model,
            backbone=_RESNET101,
            input=replace(base.model.input, short_side=800),
        ),
        data=replace(base.data, short_sides=_SHORT_SIDES, long_side=1333),
    )


def sotr_r101_dcn() -> Recipe:
    """SOTR with ResNet-101 and deformable convolutions in its last three stages on COCO.

    Command: accelerate launch -m maskset train sotr-r101-dcn --data COCO --out RUN --model.backbone.weights R-101.pkl
    Official: configs/SOTR/R_101_DCN.yaml. It requests a deformable convolution in every third block, but names a backbone that
    has them in every block, as here.
    Expect: mask AP 42.0, AP50 63.3, AP75 45.5 on COCO (official README); 42.1 on test-dev (paper, table 7).
    Status: deformable convolutions are tested separately, not against an official model; not trained on COCO here.
    """
    base = sotr_r50()
    return replace(base, model=replace(base.model, backbone=replace(_RESNET101, deformable_stages=3)))


def sotr_rt() -> Recipe:
    """SOTR-RT, the real-time variant, with ResNet-50 on COCO: two layers of the transformer and smaller images.

    Command: accelerate launch -m maskset train sotr-rt --data COCO --out RUN --model.backbone.weights R-50.pkl
    Official: neither settings nor weights are published. The paper has two layers and a short side of 736 pixels, and counts
    38.20 million parameters; this has 34.31 million, so something else differs. Sizes in training are sotr-r101's.
    Expect: mask AP 30.7, 25.2 images a second on one V100 (paper, table 6), if the unpublished settings were like these.
    Status: not trained on COCO here.
    """
    base = sotr_r101()
    return replace(
        base,
        model=replace(
            base.model,
            backbone=SotrConfig().backbone,
            depth=2,
            input=replace(base.model.input, short_side=736),
        ),
    )


def sotr_small() -> Recipe:
    """A small SOTR for small data of your own, on few cores or one GPU; all but the system is as in solq-small.

    Command: maskset train sotr-small --data FOLDER --out RUN
    Expect: depends on the data; images are resized to 256 pixels; two objects can be separated if their centers are at
    least a fortieth of the image sides apart.
    Status: not yet trained to the end.
    """
    small = solq_small()
    return replace(
        small,
        model=replace(
            sotr_tiny().model,
            input=replace(small.model.input, divisor=32),
            backbone=small.model.backbone,
            grids=(40, 36, 24, 16, 12),
            scale_from=(1, 16, 32, 64, 96),
            scale_to=(32, 64, 96, 192, 2048),
        ),
    )


def sotr_tiny() -> Recipe:
    """A very small SOTR from scratch for generated shapes.

    Command: maskset train sotr-tiny --data shapes: --out RUN
    Expect: mask AP 0.22, AP50 0.33 on the 200 images of shapes' val after 500 of its 1,750 steps, 4 minutes of one CPU core
    (`maskset compare`, benchmarks/results/compare_cpu.json).
    Status: the data and the schedule of solq-tiny; not yet trained to the end.
    """
    return replace(
        solq_tiny(),
        model=SotrConfig(
            input=InputConfig(short_side=96, long_side=160, divisor=32),
            backbone=SCRATCH,
            hidden_dim=64,
            num_heads=4,
            depth=2,
            grids=(12, 10, 8, 6, 4),
            scale_from=(1, 12, 24, 36, 48),
            scale_to=(24, 36, 48, 72, 2048),
            mask_hidden_dim=64,
            mask_dim=64,
        ),
    )
