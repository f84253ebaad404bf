"""A tiny model of every system, and batches of generated shapes, for tests."""

from dataclasses import replace
from typing import Any

import torch

from maskset.data.shapes import ShapesDataset
from maskset.instances import Instances
from maskset.structures import ImageBatch
from maskset.systems import InputConfig, SystemConfig
from maskset.systems.base import BackboneConfig
from maskset.systems.isda import IsdaConfig
from maskset.systems.istr import IstrConfig
from maskset.systems.istr_smt import IstrSmtConfig
from maskset.systems.sextant import SextantConfig
from maskset.systems.soit import SoitConfig
from maskset.systems.solq import SolqConfig
from maskset.systems.sotr import SotrConfig

BACKBONE = BackboneConfig(name="resnet10t", norm="group", frozen_stages=0, pretrained=False)
SMALLEST = replace(BACKBONE, name="test_resnet")  # for tests that need no good features
SCRATCH = {"backbone": BACKBONE, "dropout": 0.0}
NARROW = {"hidden_dim": 32, "num_heads": 4, "feedforward_dim": 64, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 12}
REFINED = {
    "hidden_dim": 32, "num_heads": 4, "feedforward_dim": 64, "dynamic_dim": 8, "roi_size": 5, "stages": 2, "num_queries": 12,
}  # fmt: skip
TINY: dict[str, SystemConfig] = {
    "solq": SolqConfig(
        **SCRATCH, **NARROW, num_classes=3, mask_size=32, code_length=48, mask_hidden_dim=64, mask_loss_layers=2,
        input=InputConfig(short_side=64, long_side=96),
    ),
    "isda": IsdaConfig(
        **SCRATCH, **NARROW, num_classes=3, num_levels=3, mask_hidden_dim=16, mask_dim=24,
        input=InputConfig(short_side=64, long_side=96, divisor=32),
    ),
    "istr": IstrConfig(
        **SCRATCH, **REFINED, num_classes=3, mask_size=16, code_length=12, target_noise=False, l1_weight=1.0,
        input=InputConfig(short_side=64, long_side=96, divisor=32),
    ),
    "istr-smt": IstrSmtConfig(
        **SCRATCH, **REFINED | {"feedforward_dim": 128, "roi_size": 7}, num_classes=3, mask_size=32, code_length=12,
        averaged_stages=2, autoencoder_steps=3, l1_weight=1.0, input=InputConfig(short_side=64, long_side=96, divisor=32),
    ),
    "soit": SoitConfig(
        **SCRATCH, **NARROW, num_classes=3, mask_loss_layers=2, input=InputConfig(short_side=64, long_side=96)
    ),
    "sotr": SotrConfig(
        backbone=BACKBONE, num_classes=3, hidden_dim=32, num_heads=4, depth=2,
        grids=(10, 8, 6, 4, 3), scale_from=(1, 8, 16, 24, 32), scale_to=(16, 24, 32, 48, 96), mask_hidden_dim=16, mask_dim=24,
        score_threshold=0.0, final_score_threshold=0.0, input=InputConfig(short_side=64, long_side=96, divisor=32),
    ),
    "sextant": SextantConfig(
        backbone=BACKBONE, num_classes=3, hidden_dim=32, num_queries=12,
        input=InputConfig(short_side=64, long_side=96, divisor=32),
    ),
}  # fmt: skip


def tiny_config(name: str, **changes: Any) -> SystemConfig:
    """Return the tiny config of a system with other settings; those of the backbone as a dict."""
    if "backbone" in changes:
        changes["backbone"] = replace(BACKBONE, **changes["backbone"])
    return replace(TINY[name], **changes)


def shapes(count: int, seed_split: str = "train", size: tuple[int, int] = (64, 80)) -> list[tuple[torch.Tensor, Instances]]:
    """Return `count` images of generated shapes [3 h w] with their objects."""
    dataset = ShapesDataset(seed_split, size=size)
    return [dataset.read(i) for i in range(count)]


def batch(examples: list[tuple[torch.Tensor, Instances]], config: SystemConfig) -> tuple[ImageBatch, list[Instances]]:
    """Return examples as a normalized batch and its objects."""
    images = ImageBatch.from_images([pixels for pixels, _ in examples], config.input.divisor)
    return images.normalized(config.input), [objects for _, objects in examples]
