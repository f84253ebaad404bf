"""The settings of a run: model, data and training. A run folder has them as `recipe.json`, a checkpoint in its metadata."""

from typing import Annotated, Literal

from maskset.config import (
    Bounds,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    check_bounds,
    config,
    setting,
)
from maskset.data.settings import DataConfig
from maskset.errors import ConfigError
from maskset.systems import SystemConfig


@config
class TrainConfig:
    """How the weights are optimized. The defaults are SOLQ's official schedule."""

    epochs: PositiveInt = setting(50, "passes over the training images")
    steps: PositiveInt | None = setting(
        None, "total optimizer steps, to which the schedule is scaled; none: as many as epochs take"
    )
    batch_size: Annotated[int, Bounds(1, 2**16)] = setting(
        32, "images in one optimizer step, over all processes and accumulated parts"
    )
    accumulate: PositiveInt = setting(1, "parts into which a batch is split, to save memory")
    learning_rate: float = setting(2e-4, "learning rate of everything but the backbone and the sampling offsets")
    backbone_learning_rate: NonNegativeFloat = setting(2e-5, "learning rate of the backbone")
    offset_learning_rate: NonNegativeFloat = setting(2e-5, "learning rate of sampling offsets and reference points")
    reference_batch_size: PositiveInt = setting(32, "batch size for which the learning rates are tuned")
    scale_learning_rate: bool = setting(False, "multiply the learning rates by batch_size / reference_batch_size")
    optimizer: Literal["adamw", "sgd"] = setting("adamw", "adamw, or sgd with momentum and without weight decay of norm layers")
    momentum: Fraction = setting(0.9, "sgd: momentum")
    weight_decay: NonNegativeFloat = setting(1e-4, "weight decay, relative to the learning rate")
    schedule: Literal["step", "cosine"] = setting(
        "step", "step: multiplied by drop_factor at drop_epochs; cosine: to zero at the end"
    )
    drop_epochs: tuple[int, ...] = setting((40,), "step: epochs after which the learning rates are multiplied by drop_factor")
    drop_factor: NonNegativeFloat = setting(0.1, "step: factor of the learning rates at drop_epochs")
    warmup_steps: NonNegativeInt = setting(0, "optimizer steps over which the learning rates rise linearly from zero")
    clip_norm: NonNegativeFloat = setting(0.1, "maximum norm of the gradient; 0 disables clipping")
    ema_decay: Fraction = setting(0.0, "decay of the weight average that is evaluated and saved; 0 disables it")
    precision: Literal["fp32", "bf16", "fp16"] = setting(
        "fp32", "precision of the network; losses and matching are always in fp32"
    )
    checkpoint_activations: bool = setting(False, "recompute the transformer's layers in the backward pass, to save memory")
    seed: Annotated[int, Bounds(0)] = setting(42, "random seed of initialization, dropout, order and augmentation")
    evaluate_every: NonNegativeInt = setting(1, "epochs between evaluations; 0 evaluates only at the end")
    checkpoint_every: NonNegativeInt = setting(
        0, "optimizer steps between checkpoints; 0 writes one at the end of each epoch only"
    )
    log_every: PositiveInt = setting(10, "optimizer steps between lines of metrics.jsonl")
    patience: NonNegativeInt = setting(0, "evaluations without a better mask AP before training stops; 0 disables it")
    max_detections: PositiveInt = setting(100, "maximum number of objects per image in evaluations")
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = setting((), "experiment trackers that get the metrics too")

    def __post_init__(self) -> None:
        check_bounds(self, "train")

        if self.batch_size % self.accumulate:
            raise ConfigError(f"train.batch_size ({self.batch_size}) must be a multiple of train.accumulate ({self.accumulate}).")
        if self.learning_rate <= 0:
            raise ConfigError(f"train.learning_rate must be positive, got {self.learning_rate}.")


@config
class Recipe:
    """The settings of one experiment."""

    model: SystemConfig
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
