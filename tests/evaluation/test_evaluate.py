"""Evaluation: results are measured on the right images, classes and counts, on one process and on two."""

import inspect
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_files import SIZE, annotation, coco, image, write
from fakes import Listed, Oracle, discs, make_instances

from maskset.errors import DataError
from maskset.evaluation.evaluate import evaluate
from maskset.instances import Category

CLASSES = (Category("cat", 5), Category("dog", 9))
SIZES = [(40, 60), (60, 40), (40, 60), (50, 50), (40, 60)]


def objects(size, seed):
    rng = np.random.default_rng(seed)
    places = [(rng.uniform(10, size[1] - 10), rng.uniform(10, size[0] - 10), 6) for _ in range(4)]
    return make_instances([0, 1, 1, 0], discs(places, size), None, CLASSES)


def data() -> Listed:
    return Listed([objects(size, seed) for seed, size in enumerate(SIZES)])


def answers(data: Listed, categories=CLASSES) -> list:
    """Return the annotations as results, for a model whose classes may be in another order."""
    order = torch.tensor([[category.name for category in categories].index(category.name) for category in data.categories])
    return [
        replace(targets, labels=order[targets.labels], scores=torch.linspace(0.9, 0.6, len(targets)), categories=categories)
        for targets in map(data.targets, range(len(data)))
    ]


def test_a_model_that_knows_the_answers_reaches_one():
    listed = data()
    metrics = evaluate(Oracle(answers(listed)), listed, progress=False)
    assert metrics.mask_ap == metrics.box_ap == 1
    assert (metrics.images, metrics.objects, metrics.skipped) == (5, 20, 0)
    assert metrics.missing_in_model == metrics.missing_in_data == ()


def test_classes_are_matched_by_name_whatever_their_order_and_ids():
    listed, classes = data(), (Category("dog", 1), Category("horse", 2), Category("cat", 3), Category("unused", 12))
    metrics = evaluate(Oracle(answers(listed, classes)), listed, progress=False)
    assert metrics.mask_ap == 1
    assert metrics.missing_in_data == ("horse", "unused")
    assert metrics.missing_in_model == ()


def test_a_class_that_the_model_lacks_counts_as_not_found():
    listed = data()
    only_cats = [replace(detections[detections.labels == 0], categories=CLASSES[:1]) for detections in answers(listed)]
    metrics = evaluate(Oracle(only_cats), listed, progress=False)
    assert metrics.missing_in_model == ("dog",)
    assert [row.mask_ap for row in metrics.per_class] == [1, 0]
    assert metrics.mask_ap == 0.5


def test_a_class_that_the_data_lacks_takes_no_place_among_the_results():
    listed, classes = data(), (*CLASSES, Category("horse", 11))
    with_horses = []
    for detections in answers(listed, classes):
        horses = replace(detections, labels=torch.full((4,), 2), scores=torch.full((4,), 0.99))
        labels, scores = torch.cat([horses.labels, detections.labels]), torch.cat([horses.scores, detections.scores])
        masks = np.concatenate([horses.masks.dense(), detections.masks.dense()])
        with_horses.append(make_instances(labels.tolist(), masks, scores.tolist(), classes))
    assert evaluate(Oracle(with_horses), listed, max_detections=4, progress=False).mask_ap == 1


def test_a_model_and_data_without_a_common_class_are_refused():
    listed = data()
    other = [replace(detections, categories=(Category("Cat", 5), Category("Dog", 9))) for detections in answers(listed)]
    with pytest.raises(DataError, match="the model detects Cat, Dog, the data has cat, dog: no class has the same name"):
        evaluate(Oracle(other), listed, progress=False)


def test_no_more_than_max_detections_are_asked_for():
    listed = data()
    metrics = evaluate(Oracle(answers(listed)), listed, max_detections=2, progress=False)
    assert metrics.max_detections == 2
    assert metrics.mask_ar == pytest.approx(0.5)


def test_a_limit_below_one_is_refused_before_anything_is_computed():
    listed = data()
    model = Oracle(answers(listed))
    with pytest.raises(ValueError, match="max_detections must be at least 1, got 0"):
        evaluate(model, listed, max_detections=0)
    assert model.batches == []


def test_images_of_one_size_share_batches():
    listed = data()
    model = Oracle(answers(listed))
    evaluate(model, listed, batch_size=2, progress=False)
    assert sorted(model.batches) == [1, 1, 1, 2]


def test_the_mode_of_every_part_of_the_model_stays_as_it_was():
    listed = data()
    model = Oracle(answers(listed)).train()
    model.frozen.eval()
    evaluate(model, listed, progress=False)
    assert model.training
    assert not model.frozen.training
    evaluate(model.eval(), listed, progress=False)
    assert not model.training


@pytest.mark.parametrize("source", [None, 5, []])
def test_data_of_another_kind_is_refused(source):
    with pytest.raises(DataError, match=r"data must be a data folder, .*got \w+"):
        inspect.unwrap(evaluate)(Oracle(answers(data())), source)


def test_a_broken_image_is_an_error_that_names_it():
    listed = data()
    listed.broken.add(3)
    with pytest.raises(DataError, match=r"3\.png"):
        evaluate(Oracle(answers(listed)), listed, progress=False)


def test_where_broken_images_are_skipped_they_are_counted_and_not_missed():
    listed = data()
    listed.broken.add(3)
    listed.skip_broken = True
    metrics = evaluate(Oracle(answers(listed)), listed, progress=False)
    assert (metrics.mask_ap, metrics.images, metrics.skipped, metrics.objects) == (1, 4, 1, 16)
    assert (metrics.unreadable, metrics.first_skipped) == (1, "3.png cannot be read as an image.")
    again = evaluate(Oracle(answers(listed)), listed, progress=False)
    assert listed.skipped == ["3.png cannot be read as an image."]  # once, though it was evaluated twice
    assert again == metrics


def test_broken_annotations_are_counted_apart_from_unreadable_images(tmp_path):
    rows = [annotation(1), annotation(2, area="large"), annotation(3, category=99), annotation(4, image=2)]
    folder = write(tmp_path, coco(rows, [image(1), image(2), image(3, height=0)]), "val")
    (folder / "val" / "2.png").write_bytes(b"no picture")
    nothing = make_instances([0], np.ones((1, *SIZE)), [0.5], (Category("cat", 7),))
    metrics = evaluate(Oracle([nothing] * 255), folder, skip_broken=True, progress=False)
    assert (metrics.images, metrics.objects, metrics.skipped, metrics.unreadable) == (1, 1, 4, 1)
    assert metrics.first_skipped.startswith(f"{folder / 'instances_val.json'}: image 3")


def test_images_that_hold_more_objects_than_count_are_counted():
    listed = Listed([objects((40, 60), 0), objects((40, 60), 1)[:2], objects((40, 60), 2)[:3]])
    metrics = evaluate(Oracle(answers(listed)), listed, max_detections=2, progress=False)
    assert (metrics.images_over_limit, metrics.most_objects) == (2, 4)
    assert evaluate(Oracle(answers(listed)), listed, max_detections=4, progress=False).images_over_limit == 0


def test_the_last_line_of_progress_is_there_though_images_were_left_out(capsys):
    listed = data()
    listed.broken.add(3)
    listed.skip_broken = True
    evaluate(Oracle(answers(listed)), listed)
    assert "evaluating: 4 of 5 images" in capsys.readouterr().err


def test_without_a_terminal_progress_is_a_line(capsys):
    listed = data()
    evaluate(Oracle(answers(listed)), listed)
    assert "evaluating: 5 of 5 images" in capsys.readouterr().err


def test_while_it_works_progress_has_the_mask_ap_so_far_each_time_the_images_have_doubled(monkeypatch, capsys):
    listed = Listed([objects((40, 60), seed) for seed in range(9)])
    results = answers(listed)
    results[2], results[5] = results[2][:2], results[5][:1]
    monkeypatch.setattr("maskset.evaluation.evaluate._FIRST_ESTIMATE", 2)
    seconds = iter(range(0, 3100, 31))  # a line after every image
    monkeypatch.setattr("maskset.progress.time.monotonic", lambda: next(seconds))
    evaluate(Oracle(results), listed)
    lines = capsys.readouterr().err.splitlines()
    aps = {n: evaluate(Oracle(results), Listed([listed.targets(i) for i in range(n)]), progress=False).mask_ap for n in (2, 4, 8)}
    assert aps[2] == 1 > aps[4] > aps[8] > 0
    notes = {n: f"mask AP ~{ap:.3f} over {n} images" for n, ap in aps.items()}
    assert [line.partition(", ")[2] for line in lines] == ["", *[notes[2]] * 2, *[notes[4]] * 4, notes[8], ""]


def test_where_nothing_is_annotated_there_is_no_estimate(monkeypatch, capsys):
    listed = data()
    empty = Listed([targets[[]] for targets in map(listed.targets, range(len(listed)))])
    monkeypatch.setattr("maskset.evaluation.evaluate._FIRST_ESTIMATE", 2)
    seconds = iter(range(0, 3100, 31))
    monkeypatch.setattr("maskset.progress.time.monotonic", lambda: next(seconds))
    evaluate(Oracle(answers(listed)), empty)
    lines = capsys.readouterr().err
    assert "evaluating: 3 of 5 images" in lines
    assert "mask AP" not in lines


def test_on_a_terminal_the_mask_ap_so_far_stands_before_the_bar(monkeypatch, capsys):
    listed = data()
    monkeypatch.setattr("maskset.evaluation.evaluate._FIRST_ESTIMATE", 2)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "150")
    evaluate(Oracle(answers(listed)), listed)
    assert "evaluating, mask AP ~1.000 over 4 images" in capsys.readouterr().err


def test_data_that_is_named_is_opened_with_everything_that_was_said_of_it(monkeypatch):
    listed, asked = data(), []
    monkeypatch.setattr("maskset.evaluation.evaluate.open_data", lambda *args: asked.append(args) or listed)
    metrics = evaluate(Oracle(answers(listed)), "a.json", split="test", images="pictures", skip_broken=True, progress=False)
    assert asked == [("a.json", "test", "pictures", True)]
    assert metrics.mask_ap == 1


PROCESS = """
import sys
from pathlib import Path

import torch

sys.path[:0] = [{tests!r}, {here!r}]
from fakes import Oracle
from maskset.evaluation.evaluate import evaluate
from test_evaluate import answers, data

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
torch.distributed.init_process_group("gloo", init_method=f"file://{{folder}}/store", rank=rank, world_size=2)
listed = data()
listed.broken.add(3)
listed.skip_broken = True
results = answers(listed)
results[1] = results[1][:2]
model = Oracle(results)
evaluate(model, listed).save(folder / str(rank))
(folder / f"batches{{rank}}").write_text(str(sum(model.batches)))
torch.distributed.destroy_process_group()
"""


def test_two_processes_share_the_images_and_both_have_the_metrics_of_one(tmp_path):
    here = Path(__file__).parent
    program = PROCESS.format(tests=str(here.parent), here=str(here))
    both = [subprocess.Popen([sys.executable, "-c", program, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    listed = data()
    listed.broken.add(3)
    listed.skip_broken = True
    results = answers(listed)
    results[1] = results[1][:2]
    expected = evaluate(Oracle(results), listed, progress=False).save(tmp_path / "alone")
    for rank in range(2):
        for name in ("metrics.json", "per_class.csv"):
            assert (tmp_path / str(rank) / name).read_bytes() == (expected / name).read_bytes()
    assert sorted((tmp_path / f"batches{rank}").read_text() for rank in range(2)) == ["2", "2"]
    assert 0 < json.loads((expected / "metrics.json").read_text())["mask_ap"] < 1
