"""The same images side by side: what is annotated, and what each model finds."""

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

_ROWS = 5  # images that are shown
_CANDIDATES = 40  # images that they are chosen from, spread over the data
_SIDE = 384  # longer side of a drawing, pixels
_GAP = 12  # between drawings, pixels
_LARGE, _SMALL = 18, 13  # height of names, and of other words, pixels


@dataclass(frozen=True)
class Shown:
    """What a model finds in some images.

    Attributes:
        found: the objects of each image by its position in the data, best first; all, whatever their scores.
        right: for each of them whether it is an annotated object that none before it is.
        threshold: the score from which on objects are drawn, see `draw_figure`.
    """

    found: Mapping[int, Instances]
    right: Mapping[int, np.ndarray]
    threshold: float

    def counts(self, index: int) -> tuple[int, int]:
        """Return how many objects above the threshold are right in an image, and how many are wrong."""
        drawn = _scores(self.found[index]) >= self.threshold
        right = int(self.right[index][drawn].sum())
        return right, int(drawn.sum()) - right


def draw_figure(models: Mapping[str, tuple[str, System | str | Path]], dataset: Dataset, path: Path) -> None:
    """Write a picture with a row for each of a few images: annotated objects, then what each model finds.

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
    shown = {
        name: look(dict(detections_in(load_model(source), dataset, candidates, 100)), dataset)
        for name, (_, source) in models.items()
    }
    readable = [index for index in candidates if all(index in one.found for one in shown.values())]
    rows = [_row(dataset, index, list(shown.values())) for index in chosen(list(shown.values()), readable, counts)]
    lines = [f"{line}, drawn from score {shown[name].threshold:.2f}" for name, (line, _) in models.items()]
    sheet = _sheet([("annotated", ""), *zip(models, lines, strict=True)], rows)
    with atomic_write(path) as part:
        sheet.save(part, "PNG")


def look(found: Mapping[int, Instances], dataset: Dataset) -> Shown:
    """Return what was found in images with what is right of it, and the threshold that suits it best."""
    right = {index: hits(one, dataset.targets(index)) for index, one in found.items()}
    annotated = sum(len(dataset.targets(index)) for index in found)
    scores = np.concatenate([np.zeros(0), *(_scores(one) for one in found.values())])
    order = np.argsort(-scores, kind="stable")
    sure = np.concatenate([np.zeros(0, bool), *right.values()])[order].cumsum()
    f1 = (2 * sure / (np.arange(1, len(scores) + 1) + annotated))[: 2 * annotated]
    if not f1.any():
        return Shown(found, right, 0.5)
    return Shown(found, right, float(scores[order][f1.argmax()]))


def hits(found: Instances, annotated: Instances) -> np.ndarray:
    """Return for each found object whether it is right: of the class, and with IoU of 0.5 or more, of an annotated one.

    Each annotated object counts once, for the best found one.
    """
    from pycocotools import mask

    right, taken = np.zeros(len(found), bool), np.zeros(len(annotated), bool)
    if not len(found) or not len(annotated):
        return right
    runs, wanted = ([row["segmentation"] for row in one.to_coco()] for one in (found, annotated))
    overlaps = np.array(mask.iou(runs, wanted, [0] * len(wanted)))
    overlaps *= (found.labels[:, None] == annotated.labels[None]).numpy()
    for i in np.argsort(-_scores(found), kind="stable"):
        best = int((overlaps[i] * ~taken).argmax())
        if overlaps[i, best] >= 0.5 and not taken[best]:
            right[i] = taken[best] = True
    return right


def chosen(models: Sequence[Shown], images: Sequence[int], counts: np.ndarray) -> list[int]:
    """Return which images are shown, see `draw_figure`."""

    def f1(model: Shown, index: int) -> float:
        right, wrong = model.counts(index)
        return 2 * right / max(1, right + wrong + int(counts[index]))

    def rank(index: int) -> tuple[float, int, int]:
        values = [f1(model, index) for model in models]
        return min(values, default=0) - max(values, default=0), -int(counts[index]), index

    return sorted(images, key=rank)[:_ROWS]


def _row(dataset: Dataset, index: int, models: Sequence[Shown]) -> list[tuple[Image.Image, str]]:
    """Return the drawings of an image, each with the line below it."""
    pixels, annotated = dataset.read(index)
    file = dataset.images[index].file
    total = len(annotated)
    row = [(_drawn(pixels, annotated), f"{file.name if file else f'image {index + 1}'}, {total} object{'s' * (total != 1)}")]
    for model in models:
        found = model.found[index]
        right, wrong = model.counts(index)
        kept = found[torch.from_numpy(_scores(found) >= model.threshold)]
        row.append((_drawn(pixels, kept), f"{right} of {total} found, {wrong} wrong"))
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


def _scores(found: Instances) -> np.ndarray:
    return np.ones(len(found)) if found.scores is None else found.scores.double().numpy()
