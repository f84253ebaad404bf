"""Metrics print as a table and are saved as JSON and CSV."""

import csv
import json
from math import nan

import pytest

from maskset.evaluation.metrics import ClassMetrics, Metrics

METRICS = Metrics(
    mask_ap=0.41254,
    box_ap=0.5,
    mask_ar=0.6,
    max_detections=300,
    images=12,
    objects=345,
    per_class=(
        ClassMetrics(name='nut, "hex"', objects=345, mask_ap=0.41254, mask_ap50=1.0, box_ap=0.5, box_ap50=0.75),
        ClassMetrics(name="bolt", objects=0, mask_ap=nan, mask_ap50=nan, box_ap=nan, box_ap50=nan),
    ),
)


def test_the_table_shows_mask_and_box_metrics_and_a_dash_for_nan():
    text = str(METRICS)
    assert "12 images, 345 objects, 2 classes, at most 300 detections per image" in text
    assert "AP        0.50:0.95   all         0.413   0.500" in text
    assert "AR@300    0.50:0.95   all         0.600       -" in text
    assert "AP        0.50:0.95   large           -       -" in text
    assert "does not have" not in text


def test_the_table_lists_classes_of_only_the_model_or_only_the_data():
    text = str(Metrics(max_detections=1, images=1, objects=1, missing_in_model=("zebra",), missing_in_data=tuple("abcdefghij")))
    assert "The model does not have 1 class (zebra) of the data" in text
    assert "The data does not have 10 classes (a, b, c, d, e, f, g, h and 2 more) of the model" in text


def test_broken_entries_are_counted_below_the_table_with_the_first_of_them():
    left_out = {"skipped": 5, "unreadable": 2, "first_skipped": "a.json: annotation 7: no area."}
    text = str(Metrics(max_detections=1, images=1, objects=1, **left_out))
    assert "3 entries of the annotation file and 2 images that cannot be read." in text
    assert "The first: a.json: annotation 7: no area." in text
    assert "Left out" not in str(METRICS)


def test_images_with_more_objects_than_max_detections_are_counted():
    text = str(Metrics(max_detections=100, images=9, objects=900, images_over_limit=3, most_objects=256))
    assert text.count("\n") == str(METRICS).count("\n") + 2  # one line, and one free before it
    assert "3 images have more than 100 objects (up to 256)" in text
    assert "raise --max-detections" in text
    assert "raise" not in str(METRICS)


def test_what_is_saved_is_json_without_nan_and_a_row_for_each_class(tmp_path):
    folder = METRICS.save(tmp_path / "new" / "folder")
    assert sorted(file.name for file in folder.iterdir()) == ["metrics.json", "per_class.csv"]
    saved = json.loads((folder / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert saved["mask_ap"] == 0.41254
    assert saved["mask_ap_small"] is None
    assert saved["per_class"][0]["name"] == 'nut, "hex"'
    with (folder / "per_class.csv").open(newline="") as file:
        nut, bolt = csv.DictReader(file)
    assert nut == {
        "name": 'nut, "hex"',
        "objects": "345",
        "mask_ap": "0.41254",
        "mask_ap50": "1.0",
        "box_ap": "0.5",
        "box_ap50": "0.75",
    }
    assert bolt["mask_ap"] == ""


def test_saving_again_replaces_what_was_there(tmp_path):
    METRICS.save(tmp_path)
    Metrics(mask_ap=0.9, max_detections=1, images=1, objects=1).save(tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text())["mask_ap"] == 0.9
