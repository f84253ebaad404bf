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
_LARGE, _SMALL = 18, 13  # font sizes of names and of other text, pixels


@dataclass(frozen=True)
class ModelDetections:
    """The detections of a model in some images, compared with the annotations.

    Attributes:
        detections: all detections by the index of the image, best first.
        correct: whether each detection is correct, see `correct_detections`.
        threshold: minimum score of a detection that is drawn, see `draw_figure`.
    """

    detections: Mapping[int, Instances]
    correct: Mapping[int, np.ndarray]
    threshold: float

    def counts(self, index: int) -> tuple[int, int]:
        """Return the numbers of correct and of wrong detections that are drawn in an image."""
        drawn = _scores(self.detections[index]) >= self.threshold
        correct = int(self.correct[index][drawn].sum())
        return correct, int(drawn.sum()) - correct


def draw_figure(models: Mapping[str, tuple[str, System | str | Path]], dataset: Dataset, path: Path) -> None:
    """Write a figure with a row for each of five images: the annotations, then each model's detections.

    Out of 40 images, the figure shows those in which the models differ most in F1 at IoU 0.5, and then those with the most
    objects. Scores of different models are not comparable, so each model has its own threshold: the one with the best F1 over
    the 40 images, with at most twice as many detections as annotated objects. The same data and models give the same figure.

    Args:
        models: by name, a line about the model, and the model: a system, or anything that `maskset.load` takes.
        dataset: the data set.
        path: path of the PNG file.
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


def match_detections(detections: Mapping[int, Instances], dataset: Dataset) -> ModelDetections:
    """Return the detections of a model, whether each is correct, and the threshold with the best F1."""
    correct = {index: correct_detections(image, dataset.targets(index)) for index, image in detections.items()}
    annotated = sum(len(dataset.targets(index)) for index in detections)
    scores = np.concatenate([np.zeros(0), *map(_scores, detections.values())])
    order = np.argsort(-scores, kind="stable")
    correct_so_far = np.concatenate([np.zeros(0, bool), *correct.values()])[order].cumsum()
    f1 = (2 * correct_so_far / (np.arange(1, len(scores) + 1) + annotated))[: 2 * annotated]
    if not f1.any():
        return ModelDetections(detections, correct, 0.5)
    return ModelDetections(detections, correct, float(scores[order][f1.argmax()]))


def correct_detections(detections: Instances, annotated: Instances) -> np.ndarray:
    """Return whether each detection is correct: an annotated object of its class has an IoU of at least 0.5 with its mask.

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


def select_images(models: Sequence[ModelDetections], images: Sequence[int], counts: np.ndarray) -> list[int]:
    """Return the indices of the images to draw, see `draw_figure`."""

    def f1(model: ModelDetections, index: int) -> float:
        correct, wrong = model.counts(index)
        return 2 * correct / max(1, correct + wrong + int(counts[index]))

    def rank(index: int) -> tuple[float, int, int]:
        values = [f1(model, index) for model in models]
        return min(values, default=0) - max(values, default=0), -int(counts[index]), index

    return sorted(images, key=rank)[:_ROWS]


def _row(dataset: Dataset, index: int, models: Sequence[ModelDetections]) -> list[tuple[Image.Image, str]]:
    """Return the drawings of an image, each with the text below it."""
    pixels, annotated = dataset.read(index)
    file = dataset.images[index].file
    total = len(annotated)
    row = [(_drawing(pixels, annotated), f"{file.name if file else f'image {index + 1}'}, {total} object{'s' * (total != 1)}")]
    for model in models:
        detections = model.detections[index]
        correct, wrong = model.counts(index)
        above = detections[torch.from_numpy(_scores(detections) >= model.threshold)]
        row.append((_drawing(pixels, above), f"{correct} of {total} detected, {wrong} wrong"))
    return row


def _drawing(pixels: torch.Tensor, objects: Instances) -> Image.Image:
    """Return the drawing of objects. Images are resized first, so that lines and labels have the same size in all drawings."""
    longer = max(pixels.shape[1:])
    if longer > _SIDE:
        pixels, objects = resize(pixels, objects, _SIDE, _SIDE)
    return objects.draw(pixels, scale=max(1, _SIDE // longer))


def _sheet(heads: Sequence[tuple[str, str]], rows: Sequence[Sequence[tuple[Image.Image, str]]]) -> Image.Image:
    """Return the drawings in rows and columns, with a head above each column and a text below each drawing."""
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
    """Write a line of text, shortened to a width in pixels."""
    font = ImageFont.load_default(size)
    if font.getlength(text) > width:
        text = next((text[:end] + "..." for end in range(len(text), 0, -1) if font.getlength(text[:end] + "...") <= width), "")
    pen.text(place, text, "black", font)


def _scores(detections: Instances) -> np.ndarray:
    return np.ones(len(detections)) if detections.scores is None else detections.scores.double().numpy()
