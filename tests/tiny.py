"""A tiny model of every system, and batches of generated shapes, for tests."""

import torch

from maskset.data.shapes import ShapesDataset
from maskset.instances import Instances
from maskset.structures import ImageBatch
from maskset.systems import Config, InputConfig
from maskset.systems.isda import IsdaConfig
from maskset.systems.istr import IstrConfig
from maskset.systems.istr_smt import IstrSmtConfig
from maskset.systems.soit import SoitConfig
from maskset.systems.solq import SolqConfig
from maskset.systems.sotr import SotrConfig

SMALL = {"backbone": "resnet10t", "backbone_norm": "group"}
SCRATCH = {"pretrained": False, "frozen_stages": 0, "dropout": 0.0}
NARROW = {"hidden_dim": 32, "num_heads": 4, "feedforward_dim": 64, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 12}
REFINED = {
    "hidden_dim": 32, "num_heads": 4, "feedforward_dim": 64, "dynamic_dim": 8, "roi_size": 5, "stages": 2, "num_queries": 12,
}  # fmt: skip
TINY: dict[str, Config] = {
    "solq": SolqConfig(
        **SMALL, **SCRATCH, **NARROW, num_classes=3, mask_size=32, code_length=48, mask_hidden_dim=64, mask_loss_layers=2,
        input=InputConfig(short_side=64, long_side=96),
    ),
    "isda": IsdaConfig(
        **SMALL, **SCRATCH, **NARROW, num_classes=3, num_levels=3, mask_hidden_dim=16, mask_dim=24,
        input=InputConfig(short_side=64, long_side=96, divisor=32),
    ),
    "istr": IstrConfig(
        **SMALL, **SCRATCH, **REFINED, num_classes=3, mask_size=16, code_length=12, target_noise=False, l1_weight=1.0,
        input=InputConfig(short_side=64, long_side=96, divisor=32),
    ),
    "istr-smt": IstrSmtConfig(
        **SMALL, **SCRATCH, **REFINED | {"feedforward_dim": 128, "roi_size": 7}, num_classes=3, mask_size=32, code_length=12,
        averaged_stages=2, autoencoder_steps=3, l1_weight=1.0, input=InputConfig(short_side=64, long_side=96, divisor=32),
    ),
    "soit": SoitConfig(
        **SMALL, **SCRATCH, **NARROW, num_classes=3, mask_loss_layers=2, input=InputConfig(short_side=64, long_side=96)
    ),
    "sotr": SotrConfig(
        **SMALL, pretrained=False, frozen_stages=0, stride_in_first=False, num_classes=3, hidden_dim=32, num_heads=4, depth=2,
        grids=(10, 8, 6, 4, 3), scale_from=(1, 8, 16, 24, 32), scale_to=(16, 24, 32, 48, 96), mask_hidden_dim=16, mask_dim=24,
        score_threshold=0.0, kept_threshold=0.0, input=InputConfig(short_side=64, long_side=96, divisor=32),
    ),
}  # fmt: skip


def shapes(count: int, seed_split: str = "train", size: tuple[int, int] = (64, 80)) -> list[tuple[torch.Tensor, Instances]]:
    """Return `count` images of generated shapes [3 h w] with their objects."""
    dataset = ShapesDataset(seed_split, size=size)
    return [dataset.read(i) for i in range(count)]


def batch(examples: list[tuple[torch.Tensor, Instances]], config: Config) -> tuple[ImageBatch, list[Instances]]:
    """Return examples as a normalised batch and its objects."""
    images = ImageBatch.from_images([pixels for pixels, _ in examples], config.input.divisor)
    return images.normalised(config.input), [objects for _, objects in examples]
