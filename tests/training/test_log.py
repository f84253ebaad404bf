"""What a run writes down and prints."""

import json

import pytest

from maskset.evaluation.metrics import Metrics
from maskset.messages import pluralize
from maskset.training.log import Log
from maskset.training.state import Progress

METRICS = Metrics(mask_ap=0.25, mask_ap50=0.5, box_ap=0.375, max_detections=100, images=2, objects=5)


@pytest.fixture
def sent():
    return []


def opened(tmp_path, sent, progress=None, active=True):
    return Log(tmp_path / "metrics.jsonl", progress or Progress(), 100, 10, lambda *args: sent.append(args), active)


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def test_a_step_becomes_a_line_of_the_file_and_one_to_read(tmp_path, sent, capsys):
    with opened(tmp_path, sent) as log:
        log.log_step(20, 1, {"rest": 1e-3, "backbone": 1e-4}, {"loss": 1.5, "class": 1.0, "class/0": 0.5}, batch_size=8)
    (line,) = lines(tmp_path)
    assert (line["split"], line["epoch"], line["step"], line["loss"], line["class/0"]) == ("train", 1, 20, 1.5, 0.5)
    assert (line["learning_rate"], line["learning_rate/backbone"]) == (1e-3, 1e-4)
    assert line["images_per_second"] == pytest.approx(8 / line["seconds"])
    said = capsys.readouterr().out
    assert "epoch 2/10  step 20/100  loss 1.5  class 1  lr 0.001" in said
    assert " left\n" in said
    assert "class/0" not in said


def test_an_evaluation_becomes_a_line_with_every_number_and_null_for_none(tmp_path, sent, capsys):
    with opened(tmp_path, sent) as log:
        log.log_evaluation(20, 1, METRICS, 3.0, ", the best so far")
    (line,) = lines(tmp_path)
    assert (line["split"], line["mask_ap"], line["mask_ap_small"], line["objects"]) == ("val", 0.25, None, 5)
    assert "epoch 2/10  mask AP 0.250  AP50 0.500  box AP 0.375  (3 s), the best so far" in capsys.readouterr().out


def test_what_is_infinite_is_null_in_the_file(tmp_path, sent):
    with opened(tmp_path, sent) as log:
        log.log_step(1, 0, {"rest": 1.0}, {"loss": 1.0, "grad_norm": float("inf")}, 1)  # as fp16 has it now and then
    assert lines(tmp_path)[0]["grad_norm"] is None
    assert "train/grad_norm" not in sent[0][0]


def test_trackers_get_the_numbers_under_the_name_of_the_split(tmp_path, sent):
    with opened(tmp_path, sent) as log:
        log.log_evaluation(20, 1, METRICS, 3.0, "")
    ((values, step),) = sent
    assert step == 20
    assert values["val/mask_ap"] == 0.25
    assert None not in values.values()


def test_the_file_is_cut_back_to_where_the_run_stands(tmp_path, sent):
    with opened(tmp_path, sent) as log:
        log.log_step(1, 0, {"rest": 1.0}, {"loss": 1.0}, 1)
        size = log.bytes
        log.log_step(2, 0, {"rest": 1.0}, {"loss": 2.0}, 1)
    with opened(tmp_path, sent, Progress(step=1, log_bytes=size)) as log:
        assert log.bytes == size
        log.log_step(2, 0, {"rest": 1.0}, {"loss": 3.0}, 1)
    assert [line["loss"] for line in lines(tmp_path)] == [1.0, 3.0]


def test_a_file_that_somebody_deleted_starts_anew_without_a_gap(tmp_path, sent):
    with opened(tmp_path, sent, Progress(step=1, log_bytes=500)) as log:
        log.log_step(2, 0, {"rest": 1.0}, {"loss": 3.0}, 1)
    assert len(lines(tmp_path)) == 1


def test_the_logs_of_other_processes_are_silent(tmp_path, sent, capsys):
    with opened(tmp_path, sent, active=False) as log:
        log.print("hello")
        log.log_step(1, 0, {"rest": 1.0}, {"loss": 1.0}, 1)
        log.log_evaluation(1, 0, METRICS, 1.0, "")
    assert not (tmp_path / "metrics.jsonl").exists()
    assert capsys.readouterr().out == ""
    assert sent == []


def test_what_is_said_is_not_taken_for_markup(tmp_path, sent, capsys):
    with opened(tmp_path, sent) as log:
        log.print("left out: head.weight [4, 8], [bold]x")
    assert "[4, 8], [bold]x" in capsys.readouterr().out


def test_on_a_terminal_there_is_a_bar_with_the_losses(tmp_path, sent, capsys, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "150")
    with opened(tmp_path, sent) as log:
        log.advance(5)
        log.log_step(5, 0, {"rest": 1.0}, {"loss": 1.25, "class": 1.0}, 1)
    said = capsys.readouterr().out
    assert "epoch 1/10" in said
    assert "5/100" in said
    assert "loss 1.25  class 1" in said


def test_one_is_not_a_plural():
    assert [pluralize(1, "step"), pluralize(2, "step"), pluralize(0, "step")] == ["1 step", "2 steps", "0 steps"]
    assert [pluralize(1, "class"), pluralize(3, "class")] == ["1 class", "3 classes"]
