"""The figure of a comparison: the same images with the annotations and each model's detections, side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from maskset.data.dataset import Dataset
from maskset.data.transforms import resize
from maskset.evaluation.evaluate import detections_in
from maskset.files import atomic_write
from maskset.inference.predict import load_model
from maskset.instances import Instances
from maskset.systems.base import System

_ROWS = 5  # images in the figure
_CANDIDATES = 40  # images to choose them from, spread over the data
_SIDE = 384  # longer side of a drawing, pixels
_GAP = 12  # between drawings, pixels
_LARGE, _SMALL = 18, 13  # height of names, and of other words, pixels


@dataclass(frozen=True)
class Predicted:
    """The detections of a model in some images, compared with the annotations.

    Attributes:
        detections: of each image by its index in the data, best first, whatever their scores.
        correct: for each detection whether it matches an annotated object that no better detection matches.
        threshold: minimum score of a detection that is drawn, see `draw_figure`.
    """

    detections: Mapping[int, Instances]
    correct: Mapping[int, np.ndarray]
    threshold: float

    def counts(self, index: int) -> tuple[int, int]:
        """Return how many of the drawn detections of an image are correct, and how many are wrong."""
        drawn = _scores(self.detections[index]) >= self.threshold
        correct = int(self.correct[index][drawn].sum())
        return correct, int(drawn.sum()) - correct


def draw_figure(models: Mapping[str, tuple[str, System | str | Path]], dataset: Dataset, path: Path) -> None:
    """Write a picture with a row for each of a few images: annotations, then each model's detections.

    The images are those in which the models differ most in F1 (at IoU 0.5), the most first; where they do not differ, those with
    the most objects. Models' scores are not on one scale, so each model's objects are drawn from the score on that gives it the
    best F1 over the 40 images that are looked at, but in all of them together not more than twice as many as are annotated. The
    same data and models give the same picture.

    Args:
        models: a line about the model, and the system or what `maskset.load` takes, by its name.
        dataset: where the images come from.
        path: of the PNG file.
    """
    counts = dataset.counts()
    filled = np.flatnonzero(counts) if counts.any() else np.arange(len(dataset))
    candidates = filled[:: max(1, -(-len(filled) // _CANDIDATES))].tolist()
    predicted = {
        name: match_detections(dict(detections_in(load_model(source), dataset, candidates, 100)), dataset)
        for name, (_, source) in models.items()
    }
    readable = [index for index in candidates if all(index in model.detections for model in predicted.values())]
    rows = [_row(dataset, index, list(predicted.values())) for index in select_images(list(predicted.values()), readable, counts)]
    lines = [f"{line}, drawn from score {predicted[name].threshold:.2f}" for name, (line, _) in models.items()]
    sheet = _sheet([("annotated", ""), *zip(models, lines, strict=True)], rows)
    with atomic_write(path) as part:
        sheet.save(part, "PNG")


def match_detections(detections: Mapping[int, Instances], dataset: Dataset) -> Predicted:
    """Return the detections of a model with which of them are correct, and the threshold of the best F1."""
    correct = {index: hits(image, dataset.targets(index)) for index, image in detections.items()}
    annotated = sum(len(dataset.targets(index)) for index in detections)
    scores = np.concatenate([np.zeros(0), *map(_scores, detections.values())])
    order = np.argsort(-scores, kind="stable")
    hits_so_far = np.concatenate([np.zeros(0, bool), *correct.values()])[order].cumsum()
    f1 = (2 * hits_so_far / (np.arange(1, len(scores) + 1) + annotated))[: 2 * annotated]
    if not f1.any():
        return Predicted(detections, correct, 0.5)
    return Predicted(detections, correct, float(scores[order][f1.argmax()]))


def hits(detections: Instances, annotated: Instances) -> np.ndarray:
    """Return for each detection whether it is correct: an annotated object has its class, and an IoU of 0.5 or more with it.

    Each annotated object counts once, for the best detection.
    """
    from pycocotools import mask

    correct, matched = np.zeros(len(detections), bool), np.zeros(len(annotated), bool)
    if not len(detections) or not len(annotated):
        return correct
    runs, targets = ([row["segmentation"] for row in objects.to_coco()] for objects in (detections, annotated))
    overlaps = np.array(mask.iou(runs, targets, [0] * len(targets)))
    overlaps *= (detections.labels[:, None] == annotated.labels[None]).numpy()
    for i in np.argsort(-_scores(detections), kind="stable"):
        best = int((overlaps[i] * ~matched).argmax())
        if overlaps[i, best] >= 0.5 and not matched[best]:
            correct[i] = matched[best] = True
    return correct


def select_images(models: Sequence[Predicted], images: Sequence[int], counts: np.ndarray) -> list[int]:
    """Return the indices of the images to draw, see `draw_figure`."""

    def f1(model: Predicted, index: int) -> float:
        correct, wrong = model.counts(index)
        return 2 * correct / max(1, correct + wrong + int(counts[index]))

    def rank(index: int) -> tuple[float, int, int]:
        values = [f1(model, index) for model in models]
        return min(values, default=0) - max(values, default=0), -int(counts[index]), index

    return sorted(images, key=rank)[:_ROWS]


def _row(dataset: Dataset, index: int, models: Sequence[Predicted]) -> list[tuple[Image.Image, str]]:
    """Return the drawings of an image, each with the line below it."""
    pixels, annotated = dataset.read(index)
    file = dataset.images[index].file
    total = len(annotated)
    row = [(_drawn(pixels, annotated), f"{file.name if file else f'image {index + 1}'}, {total} object{'s' * (total != 1)}")]
    for model in models:
        detections = model.detections[index]
        correct, wrong = model.counts(index)
        above = detections[torch.from_numpy(_scores(detections) >= model.threshold)]
        row.append((_drawn(pixels, above), f"{correct} of {total} found, {wrong} wrong"))
    return row


def _drawn(pixels: torch.Tensor, objects: Instances) -> Image.Image:
    """Return the drawing at its final size, so that lines and labels keep theirs."""
    longer = max(pixels.shape[1:])
    if longer > _SIDE:
        pixels, objects = resize(pixels, objects, _SIDE, _SIDE)
    return objects.draw(pixels, scale=max(1, _SIDE // longer))


def _sheet(heads: Sequence[tuple[str, str]], rows: Sequence[Sequence[tuple[Image.Image, str]]]) -> Image.Image:
    """Return the drawings in rows and columns, with a head above each column and a line below each drawing."""
    column = max([_SIDE // 2, *(drawing.width for row in rows for drawing, _ in row)]) + _GAP
    top, below = _GAP + _LARGE + _SMALL + 2 * _GAP, _SMALL + 2 * _GAP
    heights = [max(drawing.height for drawing, _ in row) + below for row in rows]
    sheet = Image.new("RGB", (column * len(heads) + _GAP, top + sum(heights)), "white")
    pen = ImageDraw.Draw(sheet)
    for k, (name, line) in enumerate(heads):
        _write(pen, (_GAP + k * column, _GAP), name, _LARGE, column - _GAP)
        _write(pen, (_GAP + k * column, _GAP + _LARGE + _GAP // 2), line, _SMALL, column - _GAP)
    for row, height in zip(rows, heights, strict=True):
        for k, (drawing, line) in enumerate(row):
            sheet.paste(drawing, (_GAP + k * column, top))
            _write(pen, (_GAP + k * column, top + drawing.height + _GAP // 3), line, _SMALL, column - _GAP)
        top += height
    return sheet


def _write(pen: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: int, width: int) -> None:
    """Write a line, shortened to a width in pixels."""
    font = ImageFont.load_default(size)
    if font.getlength(text) > width:
        text = next((text[:end] + "..." for end in range(len(text), 0, -1) if font.getlength(text[:end] + "...") <= width), "")
    pen.text(place, text, "black", font)


def _scores(detections: Instances) -> np.ndarray:
    return np.ones(len(detections)) if detections.scores is None else detections.scores.double().numpy()
