"""Comparisons: one budget, one table, one figure; what is done is not done again, and one that fails does not stop the others."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from runs import data, recipe

import maskset
from maskset import cli, config
from maskset.comparison import compare as module
from maskset.comparison.results import Comparison
from maskset.errors import ConfigError, DataError
from maskset.instances import Category
from maskset.recipe import Recipe, TrainConfig
from maskset.training.dry_run import Cost
from maskset.training.optimizer import rate_factor


def written(folder: Path, name: str, **settings) -> str:
    """Return a recipe.json of this name."""
    folder.mkdir(exist_ok=True)
    config.write(recipe(**settings), folder / f"{name}.json")
    return str(folder / f"{name}.json")


@pytest.fixture(scope="module")
def real(tmp_path_factory, untrained):
    """Return the folder and the result of a comparison in which all is real: two recipes of 5 steps and a trained model."""
    folder = tmp_path_factory.mktemp("real")
    models = [written(folder, "plain"), written(folder, "plainer", ema_decay=0.0), untrained]
    return folder / "out", maskset.compare(models, data(), folder / "out", epochs=1)


@pytest.fixture
def quick(monkeypatch, untrained):
    """Leave trial, training and figure out, and return the runs that would have been trained, and whether they were resumed."""
    trained: list[tuple[str, bool]] = []

    def train(recipe: Recipe, data: str, run: Path, *, resume: bool, images: str | None, progress: bool) -> None:
        trained.append((run.name, resume))
        run.mkdir(exist_ok=True)
        config.write(recipe, run / "recipe.json")
        shutil.copy(untrained, run / "last.safetensors")
        rows = [{"split": "train", "step": step, "seconds": seconds} for step, seconds in ((10, 9.0), (20, 2.0), (30, 1.0))]
        (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))

    monkeypatch.setattr(module, "train", train)
    monkeypatch.setattr(
        module, "measure_cost", lambda *_, **__: Cost(seconds=0.5, steps_per_epoch=5, gigabytes=1.25, device="CPU, 1 thread")
    )
    monkeypatch.setattr(module, "draw_figure", lambda *_: None)
    monkeypatch.setattr(module.gc, "collect", lambda: 0)  # half a second
    return trained


def test_recipes_are_trained_and_all_models_measured(real):
    out, comparison = real
    plain, plainer, model = comparison.models
    assert [entry.state for entry in comparison.models] == ["done"] * 3
    assert [entry.name for entry in comparison.models] == ["plain", "plainer", "tiny"]
    assert plain.steps == plainer.steps == 5
    assert model.steps is model.seconds_per_step is model.gigabytes is None
    assert plain.gigabytes > plainer.gigabytes > 4e-9 * 4 * plainer.parameters
    measured = maskset.evaluate(out / "plainer" / "last.safetensors", data(), progress=False)
    assert json.loads((out / "plainer" / "metrics.json").read_text()) == measured.to_dict()
    assert plainer.mask_ap == measured.to_dict()["mask_ap"]


def test_the_folder_has_runs_a_table_a_figure_and_all_of_it_as_json(real):
    out, comparison = real
    assert {path.name for path in out.iterdir()} == {
        *("comparison.json", "comparison.md", "comparison.png"),
        *("plain", "plainer", "tiny"),
    }
    assert config.read(Comparison, out / "comparison.json") == comparison
    table = (out / "comparison.md").read_text()
    assert str(comparison) in table
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1
    assert [row.split()[1] for row in rows[2:]] == ["plain", "plainer", "tiny"]
    with Image.open(out / "comparison.png") as figure:
        assert figure.width > 4 * 192


def test_what_is_done_is_not_done_again(real, quick, monkeypatch):
    out, comparison = real
    monkeypatch.setattr(module, "evaluate", lambda *_, **__: pytest.fail("measured again"))
    models = [entry.source for entry in comparison.models]
    assert maskset.compare(models, data(), out, epochs=1) == comparison
    assert quick == []


def test_an_interrupted_comparison_goes_on_where_it_was(quick, monkeypatch, tmp_path):
    models = [written(tmp_path, name) for name in ("first", "second", "third")]
    train = module.train

    def stops(recipe: Recipe, data: str, run: Path, *, resume: bool, images: str | None, progress: bool) -> None:
        train(recipe, data, run, resume=resume, images=images, progress=progress)
        if run.name == "second":
            raise KeyboardInterrupt("stopped after step 3")

    monkeypatch.setattr(module, "train", stops)
    with pytest.raises(KeyboardInterrupt, match="the same command continues the comparison in .*out"):
        maskset.compare(models, data(), tmp_path / "out")
    monkeypatch.setattr(module, "train", train)
    monkeypatch.setattr(module, "measure_cost", lambda recipe, *_, **__: Cost(0.5, 5, 2.5, "CPU, 1 thread"))
    comparison = maskset.compare(models, data(), tmp_path / "out")
    assert quick == [("first", False), ("second", False), ("second", True), ("third", False)]
    assert [entry.gigabytes for entry in comparison.models] == [1.25, 1.25, 2.5]  # a trial is not repeated


def test_the_table_has_the_median_of_the_seconds_and_the_minutes_of_all_steps(quick, tmp_path):
    (entry,) = maskset.compare([written(tmp_path, "mine")], data(), tmp_path / "out").models
    assert (entry.steps, entry.seconds_per_step, entry.minutes) == (30, 2.0, 30 * 4.0 / 60)


def test_minutes_become_steps_by_the_trial_and_stay_those(quick, monkeypatch, tmp_path):
    mine = written(tmp_path, "mine", steps=7)
    (entry,) = maskset.compare([mine], data(), tmp_path / "out", minutes=2).models
    assert config.read(Recipe, tmp_path / "out" / "mine" / "recipe.json").train.steps == entry.recipe.train.steps == 240
    monkeypatch.setattr(module, "measure_cost", lambda *_, **__: pytest.fail("tried again"))
    assert maskset.compare([mine], data(), tmp_path / "out", minutes=2).models == (entry,)
    assert "as many steps as fit into 2 minutes" in (tmp_path / "out" / "comparison.md").read_text()


def test_with_a_number_of_epochs_the_whole_schedule_is_shrunk(quick, tmp_path):
    official = replace(recipe(), train=TrainConfig(epochs=50, drop_epochs=(40,), warmup_steps=100, log_every=50))
    config.write(official, tmp_path / "mine.json")
    for _ in range(2):  # the second call goes on with it
        maskset.compare([tmp_path / "mine.json"], data(), tmp_path / "out", epochs=1, skip_broken=True)
    trained = config.read(Recipe, tmp_path / "out" / "mine" / "recipe.json")
    assert trained.train == replace(official.train, steps=5, warmup_steps=2, log_every=10, evaluate_every=0)
    assert [rate_factor(step, 5, trained.train) for step in range(5)] == pytest.approx([0.5, 1, 1, 1, 0.1])
    assert trained.data == replace(official.data, skip_broken=True)


def test_a_recipe_that_stops_early_does_not_in_a_comparison(quick, tmp_path):
    maskset.compare([written(tmp_path, "mine", patience=2, evaluate_every=3)], data(), tmp_path / "out")
    trained = config.read(Recipe, tmp_path / "out" / "mine" / "recipe.json").train
    assert (trained.patience, trained.evaluate_every) == (0, 0)


def test_the_name_of_a_recipe_means_the_recipe_whatever_folders_there_are(quick, untrained, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "solq-tiny").mkdir()
    shutil.copy(untrained, tmp_path / "solq-tiny" / "best.safetensors")
    maskset.compare(["solq-tiny"], data(), "out")
    assert quick == [("solq-tiny", False)]
    maskset.compare(["./solq-tiny"], data(), "other")
    assert quick == [("solq-tiny", False)]


def test_a_model_that_was_moved_is_found_at_its_new_place(quick, untrained, tmp_path):
    shutil.copy(untrained, tmp_path / "mine.safetensors")
    maskset.compare([tmp_path / "mine.safetensors"], data(), tmp_path / "out")
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.move(tmp_path / "mine.safetensors", tmp_path / "elsewhere")
    (entry,) = maskset.compare([moved], data(), tmp_path / "out").models
    assert entry.source == str(moved)


def test_a_model_can_be_added_and_what_the_call_does_not_name_is_kept(quick, untrained, tmp_path):
    first = written(tmp_path, "first")
    maskset.compare([first], data(), tmp_path / "out")
    assert [entry.name for entry in maskset.compare([untrained], data(), tmp_path / "out").models] == ["first", "tiny"]
    maskset.compare([untrained, first], data(), tmp_path / "out")
    assert quick == [("first", False)]


def test_a_model_whose_file_has_changed_is_measured_again(quick, monkeypatch, untrained, tmp_path):
    shutil.copy(untrained, tmp_path / "mine.safetensors")
    maskset.compare([tmp_path / "mine.safetensors"], data(), tmp_path / "out")
    model = maskset.load(untrained)
    maskset.save(model, recipe(), tmp_path / "mine.safetensors", source="another")
    measured, evaluate = [], module.evaluate
    monkeypatch.setattr(module, "evaluate", lambda *values, **options: measured.append(1) or evaluate(*values, **options))
    maskset.compare([tmp_path / "mine.safetensors"], data(), tmp_path / "out")
    assert measured == [1]


@pytest.mark.parametrize(
    ("error", "message"), [(DataError("no\nobject"), "no object"), (RuntimeError("out of memory"), "RuntimeError: out of memory")]
)
def test_one_that_fails_is_named_and_does_not_stop_the_others(quick, monkeypatch, capsys, tmp_path, error, message):
    train = module.train

    def fails(recipe: Recipe, data: str, run: Path, *, resume: bool, images: str | None, progress: bool) -> None:
        if run.name == "bad":
            raise error
        train(recipe, data, run, resume=resume, images=images, progress=progress)

    monkeypatch.setattr(module, "train", fails)
    models = [written(tmp_path, name) for name in ("bad", "good")]
    command = ["compare", *models, "--data", str(data()), "--out", str(tmp_path / "out")]
    assert cli.main(command) == 2
    output, errors = capsys.readouterr()
    assert f"\nbad failed: {message}\n" in output
    assert "| bad (failed) |     - |" in output
    assert ("Traceback" in errors) == message.startswith("RuntimeError")  # a mistake of the user needs none
    assert errors.splitlines()[-1].startswith("maskset: error: failed: bad (")
    assert quick == [("good", False)]

    monkeypatch.setattr(module, "train", train)
    assert cli.main(command) == 0
    assert quick == [("good", False), ("bad", False)]


def refused(error: type[Exception], message: str, models, folder: Path, where=None, **options) -> None:
    """Assert that a comparison is refused before anything is written."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(error, match=message) as raised:
        maskset.compare(models, data() if where is None else where, folder / "out", **options)
    assert "\n" not in str(raised.value)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (["solq-tinny"], "there is no recipe, recipe.json or run folder 'solq-tinny'; did you mean solq-tiny"),
        (["gone.json"], "gone.json cannot be read"),
        (["solq-tiny", "SOLQ_tiny"], "solq-tiny and SOLQ_tiny are both called solq-tiny: rename"),
        ([], "nothing to compare: pass recipes or trained models"),
    ],
)
def test_models_that_cannot_be_compared_are_refused(tmp_path, models, message):
    refused(ConfigError, message, models, tmp_path)


def test_the_folder_above_is_called_by_its_name(quick, untrained, monkeypatch, tmp_path):
    (tmp_path / "mine" / "samples").mkdir(parents=True)
    shutil.copy(untrained, tmp_path / "mine" / "best.safetensors")
    monkeypatch.chdir(tmp_path / "mine" / "samples")
    assert [entry.name for entry in maskset.compare([".."], data(), tmp_path / "out").models] == ["mine"]


def test_runs_and_their_files_are_called_as_the_folder(quick, untrained, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(untrained, tmp_path / name / "best.safetensors")
    files = [tmp_path / "a", tmp_path / "b" / "best.safetensors"]
    assert [entry.name for entry in maskset.compare(files, data(), tmp_path / "out").models] == ["a", "b"]
    refused(ConfigError, "a and .*best.safetensors are both called a", [files[0], files[0] / "best.safetensors"], tmp_path)


def test_a_name_that_would_hide_a_file_of_the_comparison_is_refused(tmp_path):
    refused(ConfigError, "would be called comparison.png", [written(tmp_path, "comparison.png")], tmp_path)


def test_a_name_does_not_break_the_table(quick, tmp_path):
    table = str(maskset.compare([written(tmp_path, "one|two")], data(), tmp_path / "out"))
    assert r"| one\|two " in table


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 1, "minutes": 2.0}, r"either epochs \(1\) or minutes \(2\): leave one"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"minutes": 0.0}, "minutes must be a positive number, got 0"),
        ({"minutes": float("nan")}, "minutes must be a positive number, got nan"),
        ({"max_detections": 0}, "max_detections must be at least 1, got 0"),
    ],
)
def test_a_budget_that_is_not_possible_is_refused(tmp_path, options, message):
    refused(ConfigError, message, ["solq-tiny"], tmp_path, **options)


def test_several_processes_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(ConfigError, "maskset compare runs in one process", ["solq-tiny"], tmp_path)


def test_a_model_that_knows_no_class_of_the_data_is_refused_before_anything_is_trained(monkeypatch, untrained, tmp_path):
    other = maskset.load(untrained)
    other.categories = tuple(Category(name, number) for number, name in enumerate(("cat", "dog", "cow")))
    maskset.save(other, recipe(), tmp_path / "animals.safetensors")
    message = "animals.safetensors cannot be compared on this data: the model detects cat, dog, cow, the data has ellipse"
    refused(DataError, message, ["solq-tiny", tmp_path / "animals.safetensors"], tmp_path)


def test_another_budget_other_data_and_another_recipe_are_refused_in_a_folder_that_holds_a_comparison(quick, untrained, tmp_path):
    mine = written(tmp_path, "mine")
    maskset.compare([mine], data(), tmp_path / "out", epochs=1)
    refused(ConfigError, "epochs was 1, is 2. Repeat its settings or choose a new folder", [mine], tmp_path, epochs=2)
    refused(ConfigError, "epochs was 1, is None; minutes was None, is 2", [mine], tmp_path, minutes=2)
    refused(ConfigError, "data was .*, is shapes:; .*image_count was 2, is 200", [mine], tmp_path, "shapes", epochs=1)
    written(tmp_path, "mine", learning_rate=0.5)
    refused(
        ConfigError, "mine was trained with another recipe: train.learning_rate was 0.001, is 0.5", [mine], tmp_path, epochs=1
    )
    shutil.copy(untrained, tmp_path / "mine.safetensors")
    refused(ConfigError, "mine was a recipe in .* is a model now", [tmp_path / "mine.safetensors"], tmp_path, epochs=1)
    assert quick == [("mine", False)]


def test_a_folder_with_other_things_and_a_file_are_refused(capsys, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("")
    refused(ConfigError, "out is not empty and does not contain a comparison: choose a new folder", ["solq-tiny"], tmp_path)
    assert cli.main(["compare", "solq-tiny", "--data", "shapes", "--out", str(tmp_path / "out" / "notes.txt")]) == 2
    assert "notes.txt is a file" in capsys.readouterr().err


def test_a_model_has_not_failed_when_nobody_reads_the_output(quick, monkeypatch, tmp_path):
    class Gone:
        encoding = "utf-8"

        def write(self, _: str) -> None:
            raise BrokenPipeError

        def flush(self) -> None:
            raise BrokenPipeError

    monkeypatch.setattr("sys.stdout", Gone())
    comparison = maskset.compare(written(tmp_path, "only"), data(), tmp_path / "out")
    assert [(entry.name, entry.state) for entry in comparison.models] == [("only", "done")]


def test_a_comparison_without_progress_prints_nothing(quick, capfd, tmp_path):
    maskset.compare(written(tmp_path, "only"), data(), tmp_path / "out", progress=False)
    assert capfd.readouterr() == ("", "")


def test_a_folder_that_another_process_writes_into_is_refused(quick, monkeypatch, tmp_path):
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(BlockingIOError))
    with pytest.raises(ConfigError, match="another process is writing to"):
        maskset.compare(written(tmp_path, "only"), data(), tmp_path / "out")
