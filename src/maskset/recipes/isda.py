"""Recipes for ISDA: the published one, and two for small data and few cores."""

from dataclasses import replace

from maskset.recipe import DataConfig, Recipe, TrainConfig
from maskset.recipes.backbones import SCRATCH
from maskset.recipes.solq import TINY_TRANSFORMER, solq_small, solq_tiny
from maskset.systems.base import InputConfig
from maskset.systems.isda import IsdaConfig


def isda_r50() -> Recipe:
    """ISDA with ResNet-50 on COCO.

    Command: accelerate launch -m maskset train isda-r50 --data COCO --out RUN
    Official: configs/isda/isda_r50_3x_coco.py, 8 GPUs x 1 image. It starts from a Deformable DETR that was trained on COCO for
    50 epochs (mmdetection's deformable_detr_r50): `maskset convert isda --from deformable-detr FILE START` and --init START. The
    paper speaks of ImageNet weights only, which is what this recipe starts from.
    Learning rate: 1.25e-4 is Deformable DETR's 2e-4 for 32 images, scaled to 20, though the official README trains batches of 8.
    The paper has 1.87e-5 for 3 images, by the same rule, which --train.scale-learning-rate true applies.
    Schedule: the learning rate drops after epochs 27, 33, 35, 36 and 37; the last epochs change almost nothing.
    Expect: mask AP 38.7 on test-dev (paper); no checkpoint was published, nor the schedule and batch size of this result.
    Status: the network, its losses and gradients are tested against the official code; not trained on COCO here. Where a crop
    leaves no object, the official code samples another image, and it skips images without annotations; here both count as
    background.
    """
    return Recipe(
        model=IsdaConfig(),
        data=DataConfig(augmentation="mmdet"),
        train=TrainConfig(
            epochs=42,
            batch_size=8,
            reference_batch_size=20,
            learning_rate=1.25e-4,
            backbone_learning_rate=1.25e-5,
            offset_learning_rate=1.25e-5,
            drop_epochs=(27, 33, 35, 36, 37),
        ),
    )


def isda_small() -> Recipe:
    """A small ISDA for small data of your own, on few cores or one GPU; all but the system is as in solq-small.

    Command: maskset train isda-small --data FOLDER --out RUN
    Expect: depends on the data; images are resized to 256 pixels, with at most 300 objects each.
    Status: without maskset[pretrained], trained on a CPU for 3 epochs on 536 microscope images of nuclei, 20 minutes: mask AP
    0.020, AP50 0.071 on 64 other images (`maskset compare`, benchmarks/results/compare_cpu.json). Not yet for all its epochs.
    """
    small = solq_small()
    input = replace(small.model.input, divisor=32)
    return replace(small, model=replace(isda_tiny().model, input=input, backbone=small.model.backbone, num_queries=300))


def isda_tiny() -> Recipe:
    """A very small ISDA from scratch for generated shapes.

    Command: maskset train isda-tiny --data shapes: --out RUN
    Expect: mask AP 0.26, AP50 0.34 on the 200 images of shapes' val, after 19 minutes of a CPU that had other work.
    Status: trained to the end on a CPU. Nearly all objects are segmented, but often misclassified: without proposals and from
    scratch, ISDA needs longer to learn the classes than solq-tiny and soit-tiny, whose data and schedule it has.
    """
    return replace(
        solq_tiny(),
        model=IsdaConfig(
            input=InputConfig(short_side=96, long_side=160, divisor=32),
            backbone=SCRATCH,
            **TINY_TRANSFORMER,
            mask_hidden_dim=64,
            mask_dim=64,
        ),
    )
