"""Small stand-ins: a data set in memory, and systems whose answers are known."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from maskset.data.dataset import Dataset, ImageRecord
from maskset.errors import DataError
from maskset.instances import Category, Instances, Masks
from maskset.structures import ImageBatch, ModelOutput, SlotPredictions
from maskset.systems.base import InputConfig, System

# Small, and normalized pixels are the pixels / 255.
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "short_side": 32, "long_side": 64}


def make_instances(
    labels: Sequence[int], masks: np.ndarray, scores: Sequence[float] | None, categories: tuple[Category, ...]
) -> Instances:
    """Return objects with the tight boxes of their masks [T h w]."""
    instance_masks = Masks.from_dense(torch.from_numpy(masks.astype(bool)))
    return Instances(
        labels=torch.tensor(labels, dtype=torch.int64),
        boxes=instance_masks.boxes(),
        masks=instance_masks,
        scores=None if scores is None else torch.tensor(scores, dtype=torch.float32),
        categories=categories,
    )


def discs(centers: Iterable[tuple[float, float, float]], size: tuple[int, int]) -> np.ndarray:
    """Return masks [T h w] of discs, given as x, y and radius."""
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    masks = [(x - cx) ** 2 + (y - cy) ** 2 < radius**2 for cx, cy, radius in centers]
    return np.stack(masks) if masks else np.zeros((0, *size), dtype=bool)


class Listed(Dataset):
    """A data set of what it is given. Every pixel of an image has the value position + 1, so that a system can know it again."""

    def __init__(self, objects: Sequence[Instances], crowds: Sequence[Instances] | None = None) -> None:
        super().__init__(
            objects[0].categories, [ImageRecord(i + 1, None, *targets.masks.size) for i, targets in enumerate(objects)]
        )
        self._objects, self._crowds = objects, crowds or [targets[:0] for targets in objects]
        self.broken = set[int]()

    def image(self, index: int) -> Tensor:
        if index in self.broken:
            raise DataError(f"{index}.png cannot be read as an image.")
        return torch.full((3, *self._objects[index].masks.size), index + 1, dtype=torch.uint8)

    def targets(self, index: int) -> Instances:
        return self._objects[index]

    def crowds(self, index: int) -> Instances:
        return self._crowds[index]


class _Fake(System):
    def __init__(self, categories: tuple[Category, ...], **settings) -> None:
        nn.Module.__init__(self)  # not System's: there is no config
        self.categories, self.input, self.num_slots = categories, InputConfig(**PLAIN | settings), 0
        self.frozen = nn.Identity().eval()
        self.batches: list[int] = []  # how many images each batch had

    def prepare(self, objects: Iterable[Instances]) -> None:
        raise NotImplementedError

    def loss(self, output, images, objects):
        raise NotImplementedError


class Oracle(_Fake):
    """A system that knows the answers: for image number i of a `Listed` it gives `answers[i]`, classes and scores as there."""

    def __init__(self, answers: Sequence[Instances], **settings) -> None:
        super().__init__(answers[0].categories, **settings)
        self.answers = answers

    def forward(self, images: ImageBatch) -> ModelOutput:
        assert not self.training
        answers = self._answers(images)
        self.batches.append(len(answers))
        logits = torch.full((len(answers), max(map(len, answers)), len(self.categories)), -1e3)
        for row, answer in zip(logits, answers, strict=True):
            row[torch.arange(len(answer)), answer.labels] = torch.logit(answer.scores)
        return ModelOutput([SlotPredictions(logits)])

    def postprocess(self, output, images, sizes, limit=100, threshold=0.0) -> list[Instances]:
        results = []
        for logits, answer in zip(output.layers[-1].class_logits, self._answers(images), strict=True):
            scores, best = logits[: len(answer)].sigmoid().flatten().sort(descending=True)
            scores, best = scores[:limit], best[:limit]
            slots, labels = best[scores >= threshold] // logits.shape[1], best[scores >= threshold] % logits.shape[1]
            boxes, masks = answer[slots].boxes, answer[slots].masks
            results.append(Instances(labels, boxes, masks, scores[scores >= threshold], self.categories))
        return results

    def _answers(self, images: ImageBatch) -> list[Instances]:
        return [self.answers[round(float(pixels[0, 0, 0]) * 255) - 1] for pixels in images.pixels]


class Mean(_Fake):
    """A system that finds one thing, the whole image, with a score that depends on every pixel and on the padding."""

    def forward(self, images: ImageBatch) -> ModelOutput:
        assert not self.training
        assert all(side % self.input.divisor == 0 for side in images.pixels.shape[2:])
        self.batches.append(len(images))
        return ModelOutput([SlotPredictions(torch.logit(images.pixels.mean((1, 2, 3))).view(-1, 1, 1))])

    def postprocess(self, output, images, sizes, limit=100, threshold=0.0) -> list[Instances]:
        scores = output.layers[-1].class_logits[:, 0, 0].sigmoid().tolist()
        everything = [
            make_instances([0], np.ones((1, *size)), [score], self.categories) for size, score in zip(sizes, scores, strict=True)
        ]
        return [detections[detections.scores >= threshold] for detections in everything]
