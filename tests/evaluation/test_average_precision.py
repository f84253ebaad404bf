"""COCO's numbers are those of pycocotools, on generated and on real annotations."""

import contextlib
import io
import json
import math
import pickle
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import Listed, discs, make_instances

from maskset.data import open_data
from maskset.evaluation.average_precision import average_precision, mask_ap
from maskset.evaluation.overlaps import overlaps
from maskset.instances import Category, Instances, Masks

SAMPLE = Path(__file__).parents[1] / "sample" / "nuclei"  # real annotations, see its README
CLASSES = (Category("cell", 3), Category("dust", 7), Category("hair", 8))
NUMBERS = ["ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar_1", "ar_10", "ar", "ar_small", "ar_medium", "ar_large"]


def crowded(rng: np.random.Generator, size=(150, 200), count=14) -> Instances:
    """Return random discs, small to large."""
    places = [(rng.uniform(0, size[1]), rng.uniform(0, size[0]), rng.choice([4, 9, 14, 30, 60])) for _ in range(count)]
    return make_instances(rng.integers(0, 3, count).tolist(), discs(places, size), None, CLASSES)


def disturbed(objects: Instances, rng: np.random.Generator) -> Instances:
    """Return results that resemble the objects: moved, some doubled, some lost, some of a wrong class, many equal scores."""
    indices = rng.integers(0, max(len(objects), 1), round(1.3 * len(objects)))
    dense = objects.masks[indices.tolist()].dense().numpy()
    moved = [np.roll(mask, rng.integers(-3, 4, 2), (0, 1)) for mask in dense]
    labels = np.where(
        rng.random(len(indices)) < 0.1, rng.integers(0, len(objects.categories), len(indices)), objects.labels[indices]
    )
    masks = Masks.from_dense(torch.from_numpy(np.array(moved, dtype=bool).reshape(-1, *objects.masks.size)))
    scores = torch.from_numpy(rng.integers(1, 40, len(indices)) / 40)
    return Instances(torch.from_numpy(labels), masks.boxes(), masks, scores.float(), objects.categories)


def generated(images=8, seed=0) -> tuple[Listed, list[tuple[int, Instances]]]:
    """Return a data set with crowds and an empty image, and results for it."""
    rng = np.random.default_rng(seed)
    objects = [crowded(rng, count=0 if i == 2 else 14) for i in range(images)]
    data = Listed(objects, [crowded(rng, count=2) for _ in objects])
    return data, [(i, disturbed(targets, rng)) for i, targets in enumerate(objects)]


def rows(results: Iterable[tuple[int, Instances]]) -> list[dict]:
    """Return results as a COCO file has them."""
    return [row for i, detections in results for row in detections.to_coco(i)]


def pycocotools(truth: dict, results: Iterable[dict], kind: str, max_detections: int) -> dict[str, float]:
    """Return the official program's numbers, with AP taken at `max_detections`."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    left_out = "bbox" if kind == "segm" else "segmentation"  # with both, pycocotools takes the box's area for the mask's
    trimmed = [{key: value for key, value in row.items() if key not in (left_out, "area")} for row in results]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        measured = COCOeval(coco, coco.loadRes(trimmed), kind)
        measured.params.maxDets = [1, 10, max_detections]
        measured.evaluate()
        measured.accumulate()
    precision, recall = measured.eval["precision"], measured.eval["recall"]
    of_sizes = [precision[:, :, :, 0, -1], precision[0, :, :, 0, -1], precision[5, :, :, 0, -1]]
    of_sizes += [precision[:, :, :, k, -1] for k in (1, 2, 3)]
    of_sizes += [recall[:, :, 0, k] for k in (0, 1, 2)] + [recall[:, :, k, -1] for k in (1, 2, 3)]
    return {
        name: values[values > -1].mean() if (values > -1).any() else math.nan
        for name, values in zip(NUMBERS, of_sizes, strict=True)
    }


def as_coco(data: Listed) -> dict:
    """Return a data set as the content of a COCO file."""
    annotations = []
    for i in range(len(data)):
        annotations += [{**row, "iscrowd": 0} for row in data.targets(i).to_coco(i)]
        annotations += [{**row, "iscrowd": 1} for row in data.crowds(i).to_coco(i)]
    return {
        "images": [{"id": i, "height": image.height, "width": image.width} for i, image in enumerate(data.images)],
        "categories": [{"id": category.coco_id, "name": category.name} for category in data.categories],
        "annotations": [{**row, "id": number} for number, row in enumerate(annotations, 1)],
    }


def check_all(metrics, truth: dict, results: list[dict], max_detections: int) -> None:
    for kind, prefix in (("segm", "mask"), ("bbox", "box")):
        expected = pycocotools(truth, results, kind, max_detections)
        got = {name: getattr(metrics, f"{prefix}_{name}") for name in NUMBERS}
        assert got == pytest.approx(expected, abs=1e-9, nan_ok=True), prefix


@pytest.mark.parametrize("max_detections", [100, 11, 300])
def test_the_numbers_are_those_of_pycocotools(max_detections):
    data, results = generated()
    metrics = average_precision(data, results, max_detections)
    assert 0.1 < metrics.mask_ap < 0.9
    check_all(metrics, as_coco(data), rows(results), max_detections)


def test_fewer_results_than_ten_can_count():
    data, results = generated()
    few, more = average_precision(data, results, 3), average_precision(data, results, 100)
    assert few.mask_ar_1 == more.mask_ar_1
    assert few.mask_ar == few.mask_ar_10 < more.mask_ar_10


def test_on_real_annotations_the_numbers_are_those_of_pycocotools_reading_the_file_itself():
    data, truth = open_data(SAMPLE, "val"), json.loads((SAMPLE / "instances_val.json").read_text())
    rng, indices = np.random.default_rng(1), [0, 1, 3, 4, 5]
    results = [(i, disturbed(data.targets(i), rng)) for i in indices]
    metrics = average_precision(data, results, 400, indices)
    ids = [data.images[i].id for i in indices]
    truth["images"] = [row for row in truth["images"] if row["id"] in ids]
    truth["annotations"] = [{**row, "id": row["id"] + 1} for row in truth["annotations"] if row["image_id"] in ids]  # none is 0
    check_all(metrics, truth, [{**row, "image_id": data.images[row["image_id"]].id} for row in rows(results)], 400)


def test_the_annotations_themselves_reach_one_when_enough_results_count():
    data = open_data(SAMPLE, "val")
    results = [(i, scored(data.targets(i))) for i in range(len(data))]
    assert average_precision(data, results, 40).mask_ap < 0.95  # images hold up to 52 nuclei
    metrics = average_precision(data, results, 100)
    assert metrics.mask_ap == metrics.box_ap == metrics.mask_ar == pytest.approx(1, abs=1e-9)
    assert (metrics.images, metrics.objects) == (6, 203)
    assert math.isnan(metrics.mask_ap_large)


def scored(objects: Instances) -> Instances:
    return replace(objects, scores=torch.linspace(1, 0.5, len(objects)))


def test_an_object_counts_as_found_wherever_it_stands_in_the_data():
    objects = make_instances([0], discs([(20, 20, 9)], (40, 40)), None, CLASSES)
    assert average_precision(Listed([objects]), [(0, scored(objects))]).mask_ap == 1  # an annotation id 0 would give 0


def test_without_results_everything_annotated_is_missed():
    data, _ = generated()
    metrics = average_precision(data, [])
    assert metrics.mask_ap == metrics.box_ap == metrics.mask_ar == 0


def test_without_annotations_there_is_no_number():
    data = Listed([make_instances([], discs([], (40, 40)), None, CLASSES)])
    metrics = average_precision(data, [(0, make_instances([1], discs([(20, 20, 9)], (40, 40)), [0.9], CLASSES))])
    assert math.isnan(metrics.mask_ap)
    assert math.isnan(metrics.box_ar)
    assert metrics.objects == 0


def test_what_is_found_in_a_crowd_is_not_a_mistake():
    size = (60, 60)
    person, crowd = discs([(15, 15, 9)], size), discs([(45, 45, 14)], size)
    data = Listed([make_instances([0], person, None, CLASSES)], [make_instances([0], crowd, None, CLASSES)])
    inside = discs([(45, 45, 8)], size)
    results = [(0, make_instances([0, 0], np.concatenate([inside, person]), [0.9, 0.8], CLASSES))]
    assert average_precision(data, results).mask_ap == 1
    assert average_precision(Listed([data.targets(0)]), results).mask_ap < 1


def test_a_class_has_its_own_numbers_in_the_order_of_the_data():
    size = (40, 40)
    classes = (Category("second", 9), Category("first", 4), Category("absent", 6))  # ids in no order
    objects = make_instances([0, 1], discs([(10, 10, 6), (30, 30, 6)], size), None, classes)
    metrics = average_precision(Listed([objects]), [(0, scored(objects)[:1])])
    second, first, absent = metrics.per_class
    assert (second.name, second.objects, second.mask_ap, second.box_ap50) == ("second", 1, 1, 1)
    assert (first.name, first.objects, first.mask_ap50, first.box_ap) == ("first", 1, 0, 0)
    assert (absent.name, absent.objects) == ("absent", 0)
    assert math.isnan(absent.mask_ap)
    assert metrics.mask_ap == 0.5


def test_the_annotated_area_decides_what_is_small():
    objects = make_instances([0], discs([(30, 30, 20)], (60, 60)), None, CLASSES)
    data = Listed([objects])
    data.areas = lambda index: torch.tensor([1000.0])
    metrics = average_precision(data, [(0, scored(objects))])
    assert metrics.mask_ap_small == 1
    assert math.isnan(metrics.mask_ap_medium)


def test_only_the_images_that_are_named_are_measured():
    objects = make_instances([0], discs([(20, 20, 9)], (40, 40)), None, CLASSES)
    metrics = average_precision(Listed([objects, objects]), [(1, scored(objects))], images=[1])
    assert (metrics.mask_ap, metrics.images, metrics.objects) == (1, 1, 1)


def test_a_limit_below_one_is_refused():
    data, results = generated(images=1)
    with pytest.raises(ValueError, match="max_detections must be at least 1, got 0"):
        average_precision(data, results, 0)


def test_results_without_scores_are_refused():
    data, _ = generated(images=1)
    with pytest.raises(ValueError, match="detections need scores"):
        average_precision(data, [(0, data.targets(0))])


def test_no_image_at_all_gives_no_number():
    data, _ = generated(images=1)
    metrics = average_precision(data, [], images=[])
    assert (metrics.images, metrics.objects) == (0, 0)
    assert math.isnan(metrics.mask_ap)


def test_the_order_in_which_results_come_does_not_matter():
    data, results = generated()
    assert average_precision(data, results[::-1]) == average_precision(data, results)


def test_an_estimate_is_the_mask_ap_of_its_images():
    data, results = generated()
    compared = [overlaps(data, i, detections) for i, detections in results[:5]]
    assert mask_ap(compared, CLASSES, 100) == average_precision(data, results[:5], images=range(5)).mask_ap


def test_what_is_kept_of_an_image_does_not_grow_with_its_pixels():
    def pickled_size(side: int) -> int:
        objects = make_instances([0, 1], discs([(side / 2, side / 2, side / 3)] * 2, (side, side)), [0.9, 0.8], CLASSES)
        return len(pickle.dumps(overlaps(Listed([objects]), 0, objects)))

    assert pickled_size(20) == pickled_size(500) < 2000
