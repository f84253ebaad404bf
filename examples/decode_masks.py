"""Measure how well D numbers represent a mask: python examples/decode_masks.py [DATA]

SOLQ predicts a mask as low-frequency DCT coefficients. This example encodes the annotated masks of a few images, decodes them and
compares both. There is no network: the result is an upper bound for every network with this code.
"""

import sys

import torch

from maskset.codec_tools.compare import reconstruct
from maskset.data import open_data
from maskset.instances import Masks
from maskset.masks.codecs.dct import DctCodec


def iou(masks: Masks, others: Masks) -> torch.Tensor:
    """Return the IoU of corresponding masks."""
    a, b = masks.dense(), others.dense()
    return (a & b).sum((1, 2)) / (a | b).sum((1, 2)).clamp(min=1)


def main(data: str = "shapes:", images: int = 20) -> dict[int, float]:
    """Return the mean IoU for each number of coefficients."""
    dataset = open_data(data, "val")
    means = {}
    for length in (16, 64, 256):
        codec = DctCodec(size=128, length=length)
        overlaps = []
        for index in range(min(images, len(dataset))):
            objects = dataset.targets(index)
            overlaps.append(iou(objects.masks, reconstruct(codec, objects.masks, objects.boxes)))
        means[length] = float(torch.cat(overlaps).mean())
        print(f"{length:4} numbers: mean IoU {means[length]:.3f}")
    return means


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "shapes:")
