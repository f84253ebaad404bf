"""Metrics of an evaluation: printed as COCO's table, saved as JSON and CSV."""

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import nan
from pathlib import Path
from typing import Any

from maskset.files import atomic_write
from maskset.messages import first_names, pluralize

# Rows of the printed table: metric, IoU, area, and the name of the attribute without mask_ or box_.
_ROWS = (
    ("AP", "0.50:0.95", "all", "ap"),
    ("AP50", "0.50", "all", "ap50"),
    ("AP75", "0.75", "all", "ap75"),
    ("AP", "0.50:0.95", "small", "ap_small"),
    ("AP", "0.50:0.95", "medium", "ap_medium"),
    ("AP", "0.50:0.95", "large", "ap_large"),
    ("AR@1", "0.50:0.95", "all", "ar_1"),
    ("AR@10", "0.50:0.95", "all", "ar_10"),
    ("AR@{most}", "0.50:0.95", "all", "ar"),
    ("AR@{most}", "0.50:0.95", "small", "ar_small"),
    ("AR@{most}", "0.50:0.95", "medium", "ar_medium"),
    ("AR@{most}", "0.50:0.95", "large", "ar_large"),
)


@dataclass(frozen=True, kw_only=True)
class ClassMetrics:
    """Metrics of one class; NaN where the data has no object of it.

    Attributes:
        name: name of the class.
        objects: number of objects in the data.
        mask_ap: average precision of masks over IoU 0.50:0.95; `box_ap` of boxes.
        mask_ap50: the same at IoU 0.50; `box_ap50` of boxes.
    """

    name: str
    objects: int
    mask_ap: float
    mask_ap50: float
    box_ap: float
    box_ap50: float


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Metrics of an evaluation; `print` shows COCO's table. A metric without objects to measure is NaN.

    Average precision (`ap`) and average recall (`ar`) are means over classes and over IoU 0.50:0.95; `ap50` and `ap75` are at
    IoU 0.50 and 0.75. Small objects have an area below 32 x 32 pixels, large objects at least 96 x 96. `ar_1`, `ar_10` and `ar`
    are at most 1, 10 and `max_detections` detections per class and image.

    Attributes:
        max_detections: largest number of detections that count in an image.
        images: number of evaluated images.
        skipped: number of broken annotations and images that were left out; 0 without `skip_broken`.
        unreadable: number of images among these that could not be read; the others were left out when the data was opened.
        first_skipped: description of the first of these.
        objects: number of targets in the images, without crowds.
        images_over_limit: number of images with more than `max_detections` objects, which cannot all be detected.
        most_objects: largest number of objects in an image.
        per_class: one element per class of the data, in the data's order.
        missing_in_model: classes of the data that the model does not have; their objects count as missed.
        missing_in_data: classes of the model that the data does not have; their detections are ignored.
    """

    mask_ap: float = nan
    mask_ap50: float = nan
    mask_ap75: float = nan
    mask_ap_small: float = nan
    mask_ap_medium: float = nan
    mask_ap_large: float = nan
    mask_ar_1: float = nan
    mask_ar_10: float = nan
    mask_ar: float = nan
    mask_ar_small: float = nan
    mask_ar_medium: float = nan
    mask_ar_large: float = nan
    box_ap: float = nan
    box_ap50: float = nan
    box_ap75: float = nan
    box_ap_small: float = nan
    box_ap_medium: float = nan
    box_ap_large: float = nan
    box_ar_1: float = nan
    box_ar_10: float = nan
    box_ar: float = nan
    box_ar_small: float = nan
    box_ar_medium: float = nan
    box_ar_large: float = nan
    max_detections: int
    images: int
    skipped: int = 0
    unreadable: int = 0
    first_skipped: str = ""
    objects: int
    images_over_limit: int = 0
    most_objects: int = 0
    per_class: tuple[ClassMetrics, ...] = ()
    missing_in_model: tuple[str, ...] = ()
    missing_in_data: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"{self.images} images, {self.objects} objects, {pluralize(len(self.per_class), 'class')}, "
            f"at most {self.max_detections} detections per image",
            "",
            f"{'':10}{'IoU':12}{'area':10}{'mask':>7}{'box':>8}",
        ]
        for metric, iou, area, name in _ROWS:
            mask, box = getattr(self, f"mask_{name}"), getattr(self, f"box_{name}")
            lines.append(f"{metric.format(most=self.max_detections):10}{iou:12}{area:10}{_short(mask):>7}{_short(box):>8}")
        return "\n".join(lines + [line for note in self.notes() for line in ("", note)])

    def notes(self) -> list[str]:
        """Return the notes below the table: data that was left out, and objects that could not be detected."""
        notes = []
        if self.skipped:
            notes.append(
                f"Left out as broken: {self.skipped - self.unreadable} entries of the annotation file and "
                f"{self.unreadable} images that cannot be read. The first: {self.first_skipped}"
            )
        if self.images_over_limit:
            notes.append(
                f"{self.images_over_limit} images have more than {self.max_detections} objects (up to {self.most_objects}), "
                "not all of which can be detected: raise --max-detections (in training --train.max-detections)."
            )
        if self.missing_in_model:
            notes.append(f"The model does not have {_classes(self.missing_in_model)} of the data: their objects count as missed.")
        if self.missing_in_data:
            notes.append(f"The data does not have {_classes(self.missing_in_data)} of the model: their detections are ignored.")
        return notes

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers, text, lists and dicts, with None for NaN."""
        return _without_nan(asdict(self))

    def save(self, folder: str | Path) -> Path:
        """Write `metrics.json` and `per_class.csv` into a folder, which is created if necessary, and return the folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / "metrics.json") as part:
            part.write_text(json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        with atomic_write(folder / "per_class.csv") as part, part.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(ClassMetrics.__dataclass_fields__))
            table.writeheader()
            table.writerows(_without_nan(asdict(row)) for row in self.per_class)
        return folder


def _short(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _classes(names: Sequence[str]) -> str:
    return f"{pluralize(len(names), 'class')} ({first_names(names)})"


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value
