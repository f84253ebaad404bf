"""COCO's average precision of masks and boxes, from what was found to all numbers, against pycocotools.

Generated images of 480 x 640 pixels with 7 objects each on average, of 80 classes, and 100 results in each, half of which
resemble an object; 500 images, or as many as `--images` says. maskset starts from results as models give them, pycocotools from
rows of a COCO results file that are in memory already: what reads and writes such files is not counted.
"""

import contextlib
import io
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from benchmarks.measure import in_turn
from benchmarks.report import Report
from maskset.data.dataset import Dataset, ImageRecord
from maskset.evaluation.average_precision import average_precision
from maskset.instances import Category, Instances, Masks

SIZE, CLASSES, RESULTS, BASELINE = (480, 640), 80, 100, "pycocotools"
_KINDS: tuple[tuple[str, Literal["segm", "bbox"], str], ...] = (("mask", "segm", "bbox"), ("box", "bbox", "segmentation"))
ALLOWED = 600 / 5000  # seconds for an image
NUMBERS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar_1", "ar_10", "ar", "ar_small", "ar_medium", "ar_large")


def run(report: Report, quick: bool, images: int = 500) -> None:
    """Measure both on the same results."""
    data = Generated(8 if quick else images)
    found = [results(data, index) for index in range(len(data))]
    truth, rows = content(data), [row for index, one in enumerate(found) for row in one.to_coco(index)]
    few = data if len(data) <= 100 else Generated(100)
    apart = differences(ours(few, found[: len(few)]), theirs(content(few), [row for row in rows if row["image_id"] < len(few)]))
    report.agree(f"all 24 numbers of masks and boxes, {len(few)} images", apart, 1e-9)
    implementations = {BASELINE: partial(theirs, truth, rows), "maskset": partial(ours, data, found)}
    case = f"masks and boxes of {len(data):,} images, {sum(map(len, found)):,} results"
    report.compare(case, BASELINE, in_turn(implementations, 0 if quick or images > 1000 else 60))
    figure = report.figure(case, "maskset")
    assert figure is not None
    assert figure.milliseconds is not None
    report.note(f"maskset: {figure.milliseconds / len(data):.1f} ms an image.")
    what = f"evaluation of {len(data):,} images, relative to a budget of {ALLOWED:g} s per image"
    report.target(what, 1, 1000 * ALLOWED * len(data) / figure.milliseconds)


def ours(data: "Generated", found: Sequence[Instances]) -> dict[str, float]:
    """Return the metrics of maskset."""
    metrics = average_precision(data, enumerate(found), RESULTS)
    return {f"{kind}_{name}": getattr(metrics, f"{kind}_{name}") for kind in ("mask", "box") for name in NUMBERS}


def theirs(truth: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the metrics of pycocotools."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    numbers = {}
    with contextlib.redirect_stdout(io.StringIO()):
        # With box and mask in one row, it would use the area of the box for the mask.
        for kind, name, left_out in _KINDS:
            coco: Any = COCO()
            coco.dataset = truth
            coco.createIndex()
            own = coco.loadRes([{key: value for key, value in row.items() if key not in (left_out, "area")} for row in rows])
            measured = COCOeval(coco, own, name)
            measured.evaluate()
            measured.accumulate()
            measured.summarize()
            numbers |= {f"{kind}_{number}": value for number, value in zip(NUMBERS, measured.stats, strict=True)}
    return numbers


def differences(numbers: dict[str, float], others: dict[str, float]) -> float:
    """Return the greatest difference; pycocotools says -1 where maskset says NaN."""
    return max(abs((-1 if np.isnan(numbers[name]) else numbers[name]) - others[name]) for name in numbers)


def content(data: "Generated") -> dict[str, Any]:
    """Return a data set as the content of a COCO file."""
    rows = [row for index in range(len(data)) for row in data.targets(index).to_coco(index)]
    return {
        "images": [{"id": one.id, "height": one.height, "width": one.width} for one in data.images],
        "categories": [{"id": one.coco_id, "name": one.name} for one in data.categories],
        "annotations": [{**row, "id": number} for number, row in enumerate(rows, 1)],
    }


class Generated(Dataset):
    """Ellipses with rough outlines, about 7 in an image, of a few of the classes."""

    def __init__(self, images: int) -> None:
        categories = [Category(f"class {k}", k + 1) for k in range(CLASSES)]
        super().__init__(categories, [ImageRecord(i, None, *SIZE) for i in range(images)])
        self.drawn = [self._draw(np.random.default_rng([0, i])) for i in range(images)]
        self._objects = [instances(np.random.default_rng([1, i]), *drawn, None) for i, drawn in enumerate(self.drawn)]

    def _draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return the labels, and x, y, half width and half height, of an image's objects."""
        present = np.minimum(rng.geometric(0.05, 3) - 1, CLASSES - 1)  # few classes are frequent
        count = 1 + rng.poisson(6.25)
        return rng.choice(present, count), ellipses(rng, count)

    def image(self, index: int) -> Tensor:
        """Return black pixels."""
        return torch.zeros(3, *SIZE, dtype=torch.uint8)

    def targets(self, index: int) -> Instances:
        """Return the objects of an image."""
        return self._objects[index]


def results(data: Generated, index: int) -> Instances:
    """Return simulated detections in an image; half of them resemble the objects."""
    rng, (labels, shapes) = np.random.default_rng([2, index]), data.drawn[index]
    chosen, near = rng.integers(0, len(labels), RESULTS), rng.random(RESULTS) < 0.5
    moved = shapes[chosen] + rng.normal(0, 0.12, (RESULTS, 4)) * np.tile(shapes[chosen][:, 2:], 2)
    drawn = np.where(near[:, None], moved, ellipses(rng, RESULTS))
    drawn[:, 2:] = drawn[:, 2:].clip(3, 250)
    guess = np.where(near & (rng.random(RESULTS) < 0.8), labels[chosen], rng.integers(0, CLASSES, RESULTS))
    scores = np.where(near, rng.beta(3, 3, RESULTS), rng.beta(1, 6, RESULTS))
    order = np.argsort(-scores)
    return instances(rng, guess[order], drawn[order], scores[order])


def ellipses(rng: np.random.Generator, count: int) -> Float[np.ndarray, "n 4"]:
    """Return x, y, half width and half height, small to large."""
    centers = rng.uniform(0, [SIZE[1], SIZE[0]], (count, 2))
    return np.concatenate([centers, np.exp(rng.normal(3.4, 0.8, (count, 2))).clip(3, 250)], 1)


def instances(rng: np.random.Generator, labels: np.ndarray, shapes: np.ndarray, scores: np.ndarray | None) -> Instances:
    """Return ellipses as objects, without those outside of the image."""
    runs = [outlined(rng, *shape) for shape in shapes]
    kept = [i for i, one in enumerate(runs) if len(one) > 1]
    x, y, half_width, half_height = shapes[kept].T
    corners = np.stack([x - half_width, y - half_height, x + half_width, y + half_height], 1)
    boxes = torch.from_numpy(corners.clip(0, [SIZE[1], SIZE[0]] * 2).astype(np.float32))
    found = None if scores is None else torch.from_numpy(scores[kept].astype(np.float32))
    categories = tuple(Category(f"class {k}", k + 1) for k in range(CLASSES))
    masks = Masks([torch.from_numpy(runs[i]) for i in kept], SIZE)
    return Instances(torch.from_numpy(labels[kept].astype(np.int64)), boxes, masks, found, categories)


def outlined(rng: np.random.Generator, x: float, y: float, half_width: float, half_height: float) -> Int[np.ndarray, "runs"]:
    """Return the run lengths of an ellipse with a rough outline; a single one if no column of it is in the image."""
    height, width = SIZE
    columns = np.arange(max(1, round(x - half_width)), min(width - 1, round(x + half_width)))
    half = half_height * np.sqrt(np.clip(1 - ((columns - x) / half_width) ** 2, 0, 1)) + rng.uniform(0.5, 2.5, (2, len(columns)))
    tops, ends = np.clip(y - half[0], 1, height - 2).astype(np.int64), np.clip(y + half[1], 2, height - 1).astype(np.int64)
    edges = np.stack([columns * height + tops, columns * height + np.maximum(ends, tops + 1)], 1).ravel()
    return np.diff(edges, prepend=0, append=height * width).astype(np.int32)
