"""All there is to know of a run: the model, the data, the training. Written beside every checkpoint as `recipe.json`."""

from typing import Literal

from maskset.config import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Probability,
    check_bounds,
    config,
)
from maskset.errors import ConfigError
from maskset.systems import SystemConfig

Augmentation = Literal["detr", "mmdet", "flip", "lsj", "none"]


@config
class DataConfig:
    """How annotated images become training batches."""

    augmentation: Augmentation = "detr"  # detr: flip, scale, crop; mmdet: scale once; flip: no crop; lsj: jitter; none: as it is
    short_sides: tuple[int, ...] = tuple(range(480, 801, 32))  # detr, mmdet, flip: one is drawn for each image, pixels
    long_side: int = 1333  # detr, mmdet, flip: the longer side is at most this, pixels
    crop_short_sides: tuple[int, ...] = (400, 500, 600)  # detr, mmdet: half of the images get one of these, then a crop, pixels
    crop_range: tuple[int, int] = (384, 600)  # detr, mmdet: least and greatest side of that crop, pixels
    crop_share: Probability = 0.0  # detr, mmdet: above 0, each side of that crop is this share of the image's instead
    jitter_size: int = 1024  # lsj: side of the square canvas, pixels
    jitter_scale: tuple[float, float] = (0.1, 2.0)  # lsj: least and greatest scale relative to the canvas
    group_by_aspect: bool = True  # batches hold only wide or only tall images, which saves padding
    workers: NonNegativeInt = 2  # processes that read images; the result does not depend on it
    skip_broken: bool = False  # leave out (and count) broken images and annotations instead of stopping

    def __post_init__(self) -> None:
        check_bounds(self, "data")
        if not self.short_sides or min(self.short_sides) < 1:
            raise ConfigError(f"data.short_sides needs one or more positive sizes, got {self.short_sides}.")
        if self.augmentation in ("detr", "mmdet") and not self.crop_short_sides:
            raise ConfigError(f"data.crop_short_sides needs one or more sizes with augmentation {self.augmentation}.")
        if min(self.long_side, self.jitter_size, *self.crop_short_sides) < 1:
            raise ConfigError("data.long_side, data.jitter_size and data.crop_short_sides must be at least 1.")
        if not 0 < self.jitter_scale[0] <= self.jitter_scale[1]:
            raise ConfigError(f"data.jitter_scale must rise from above 0, got {self.jitter_scale}.")
        if self.crop_range[0] > self.crop_range[1] or self.crop_range[0] < 1:
            raise ConfigError(f"data.crop_range must rise from at least 1, got {self.crop_range}.")


@config
class TrainConfig:
    """How the weights are optimised. The defaults are SOLQ's official schedule."""

    epochs: PositiveInt = 50  # passes over the training images
    steps: int | None = None  # optimiser steps in all, to which the schedule of the epochs is shrunk or stretched; none: epochs
    batch_size: PositiveInt = 32  # images in one optimiser step, over all processes and accumulated parts
    accumulate: PositiveInt = 1  # parts that a step's batch is split in, to save memory
    learning_rate: float = 2e-4  # of everything but the backbone and the sampling offsets
    backbone_learning_rate: NonNegativeFloat = 2e-5  # of the backbone
    offset_learning_rate: NonNegativeFloat = 2e-5  # of sampling offsets and reference points
    reference_batch_size: PositiveInt = 32  # the batch size that the learning rates were chosen for
    scale_learning_rate: bool = False  # multiply the learning rates by batch_size / reference_batch_size
    optimizer: Literal["adamw", "sgd"] = "adamw"  # adamw: AdamW; sgd: with momentum, and no decay of norms
    momentum: Fraction = 0.9  # sgd: share of the last step that is done again
    weight_decay: NonNegativeFloat = 1e-4  # share of a weight that is taken away in a step, times the learning rate
    schedule: Literal["step", "cosine"] = "step"  # step: divided at drop_epochs; cosine: to zero at the end
    drop_epochs: tuple[int, ...] = (40,)  # step: epochs after which the learning rates are multiplied by drop_factor
    drop_factor: NonNegativeFloat = 0.1  # step: the factor
    warmup_steps: NonNegativeInt = 0  # optimiser steps over which the learning rates rise linearly from zero
    clip_norm: NonNegativeFloat = 0.1  # greatest norm of the gradient; 0 leaves it alone
    ema_decay: Fraction = 0.0  # decay of the averaged weights that are evaluated and saved; 0 keeps none
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the network; losses and matching are always fp32
    checkpoint_activations: bool = False  # save memory: the transformer's layers compute all but their inputs twice
    seed: NonNegativeInt = 42  # of initialisation, dropout, order and augmentation
    evaluate_every: NonNegativeInt = 1  # epochs between evaluations; 0 evaluates only at the end
    checkpoint_every: NonNegativeInt = 0  # optimiser steps between checkpoints; 0 writes one at the end of each epoch only
    log_every: PositiveInt = 10  # optimiser steps between lines of metrics.jsonl
    patience: NonNegativeInt = 0  # stop after so many evaluations without a better mask AP; 0 never stops
    max_detections: PositiveInt = 100  # objects per image that an evaluation keeps
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()  # where to send the metrics as well

    def __post_init__(self) -> None:
        check_bounds(self, "train")
        if self.steps is not None and not 1 <= self.steps < 2**31:
            raise ConfigError(f"train.steps must be at least 1 and below 2^31, got {self.steps}.")
        if self.batch_size % self.accumulate:
            raise ConfigError(f"train.batch_size ({self.batch_size}) must be a multiple of train.accumulate ({self.accumulate}).")
        if self.learning_rate <= 0:
            raise ConfigError(f"train.learning_rate must be positive, got {self.learning_rate}.")


@config
class Recipe:
    """One experiment, whole: what is trained, on what, how."""

    model: SystemConfig
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
