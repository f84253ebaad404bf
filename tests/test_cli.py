"""The command line: its help, its results, and how errors are reported."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import ModuleType
from typing import get_args, get_type_hints

import pytest
import torch
from PIL import Image

from maskset import cli
from maskset.arguments import FIRST_SETTINGS
from maskset.commands import CONVERTIBLE
from maskset.distributed import launched
from maskset.errors import MasksetError, Terminated
from maskset.recipe import DataConfig, TrainConfig
from maskset.systems import CONFIGS


def answer(capsys, *arguments: str) -> tuple[int, str, str]:
    """Return a command's exit code, output and error output."""
    code = cli.main(arguments)
    return code, *capsys.readouterr()


def refusal(capsys, *arguments: str) -> str:
    """Return the one line with which a user's mistake is reported."""
    code, output, error = answer(capsys, *arguments)
    assert code == 2
    assert output == ""
    assert error.startswith("maskset: error: ")
    assert error.count("\n") == 1
    return error.removeprefix("maskset: error: ").strip()


def replace_command(monkeypatch, name: str, call) -> None:
    monkeypatch.setitem(cli.COMMANDS, name, replace(cli.COMMANDS[name], call=call))


def in_a_shell(script: str, **options) -> subprocess.CompletedProcess:
    """Run a bash script in which $MASKSET is the command."""
    environment = os.environ | {"MASKSET": f"{sys.executable} -m maskset"}
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment, timeout=120, **options)


def test_without_a_command_there_is_a_help_of_under_25_lines_in_groups(capsys):
    code, output, _ = answer(capsys)
    assert code == 0
    assert output.count("\n") < 25
    assert re.findall(r"^(\w.*)\n  ", output, flags=re.MULTILINE) == list(cli.GROUPS)
    for name in cli.COMMANDS:
        assert f"\n  {name} " in output
    assert answer(capsys, "--help")[1] == output


def test_the_help_is_there_without_torch():
    program = """
import sys
from maskset.cli import main
for arguments in (["--help"], ["--version"], ["train", "--help"], ["predict", "--help"]):
    try:
        main(arguments)
    except SystemExit:
        pass
sys.exit("torch" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself_on_24_lines(capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        cli.main([*name.split(), "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: maskset {name}" in text
    assert text.count("\n") <= 24
    assert max(map(len, text.splitlines())) <= 80


def test_the_overview_and_the_help_of_a_recipe_fit_on_the_screen(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["--help"]) == 0
    with pytest.raises(SystemExit):
        cli.main(["train", "solq-small", "--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_a_mistyped_command_is_answered_with_the_nearest(capsys):
    assert refusal(capsys, "trian") == "there is no command trian; did you mean train? (`maskset --help` lists them)."
    assert refusal(capsys, "codec", "fit").startswith("there is no command codec; did you mean codecs?")


def test_a_mistyped_second_word_is_answered_with_the_nearest(capsys):
    message = "there is no command codecs compar; did you mean codecs compare? (`maskset codecs --help` lists them)."
    assert refusal(capsys, "codecs", "compar", "my_data") == message
    assert "did you mean codecs fit?" in refusal(capsys, "codecs", "fitt")
    assert refusal(capsys, "codecs", "xyz") == "there is no command codecs xyz (`maskset codecs --help` lists them)."
    assert "has several commands: " in refusal(capsys, "codecs", "--skip-broken")


@pytest.mark.parametrize(
    "arguments", [["train", "solq-tiny", "--train.epoch", "3"], ["train", "solq-tiny", "--train.epoch=3", "--out", "x"]]
)
def test_a_mistyped_setting_is_answered_with_the_nearest(capsys, arguments):
    assert "there is no flag --train.epoch; did you mean --train.epochs?" in refusal(capsys, *arguments)


def test_a_flag_is_not_guessed_from_its_first_letters(capsys):
    assert "there is no flag --thresh; did you mean --threshold?" in refusal(capsys, "predict", "m", "x.png", "--thresh", "0.1")


@pytest.mark.parametrize(
    "arguments",
    [["predict", "m", ""], ["predict", "", "x.png"], ["predict", "m", "x.png", "--out", ""], ["predict", "m", "x.png", "--out="]],
)
def test_an_empty_argument_does_not_stand_for_the_current_folder(capsys, arguments):
    assert "is empty: is a shell variable unset?" in refusal(capsys, *arguments)


def test_a_file_name_that_begins_with_a_hyphen_is_answered_with_how_to_write_it(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-dash.png").touch()
    message = "there is no flag -dash.png; a file of this name is written ./-dash.png"
    assert message in refusal(capsys, "predict", "m", "-dash.png")
    assert "there is no flag -x (" in refusal(capsys, "predict", "m", "-x")


def test_what_is_missing_is_named(capsys):
    assert "--out" in refusal(capsys, "train", "solq-tiny", "--data", "shapes:")
    assert "the recipe comes first" in refusal(capsys, "train", "--data", "shapes:", "--out", "x")


def test_the_settings_of_the_named_recipe_are_the_defaults_of_the_flags(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "solq-tiny", "--help-all"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--model.hidden-dim VALUE width C" in text
    assert "(default: resnet10t)" in text
    with pytest.raises(SystemExit):
        cli.main(["train", "solq-tiny", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--model.hidden-dim" not in text
    assert "--train.epochs N passes over the training images (default: 7)" in text


def test_the_settings_in_the_help_without_a_recipe_are_those_of_recipes():
    from maskset import flags, recipes

    assert len(FIRST_SETTINGS) == 10
    assert {setting.name for setting in flags.flatten(recipes.get("solq-r50"))} > FIRST_SETTINGS.keys()
    for name, choices, setting in (
        ("train.precision", FIRST_SETTINGS["train.precision"][0].split("|"), TrainConfig),
        ("data.augmentation", FIRST_SETTINGS["data.augmentation"][1].split(", "), DataConfig),
    ):
        assert tuple(choices) == get_args(get_type_hints(setting)[name.split(".")[1]])


def test_flags_change_the_recipe_that_is_trained(monkeypatch, tmp_path):
    from maskset import recipes
    from maskset.training import train as loop

    asked = []
    monkeypatch.setattr(loop, "train", lambda *values, **options: asked.append((values, options)))
    flags = ["--train.epochs", "3", "--data.workers", "0", "--model.two-stage", "true"]
    assert cli.main(["train", "solq-tiny", "--data", "shapes:", "--out", str(tmp_path / "run"), *flags]) == 0
    (recipe, data, out), options = asked[0]
    assert (recipe.train.epochs, recipe.data.workers, recipe.model.two_stage) == (3, 0, True)
    assert recipe.model.hidden_dim == recipes.get("solq-tiny").model.hidden_dim
    assert (data, out) == ("shapes:", tmp_path / "run")
    assert options == {"init": None, "resume": False, "images": None}


def test_a_recipe_that_does_not_come_first_is_refused_and_no_other_is_trained(capsys, monkeypatch, tmp_path):
    from maskset.training import train as loop

    monkeypatch.setattr(loop, "train", lambda *_, **__: pytest.fail("the default recipe would be trained"))
    message = refusal(capsys, "train", "--data", "shapes:", "--out", str(tmp_path / "run"), "solq-tiny")
    assert "the recipe comes first: maskset train RECIPE" in message


def test_commands_of_two_words_are_explained_by_their_first(capsys):
    assert cli.main(["codecs", "--help"]) == 0
    text = capsys.readouterr().out
    assert "codecs fit" in text
    assert "codecs compare" in text
    assert "predict " not in text


@pytest.mark.parametrize("command", [["predict", "m", "x.png"], ["evaluate", "m", "--data", "shapes:"]])
def test_a_file_where_a_folder_is_written_is_refused_before_the_work(capsys, tmp_path, command):
    (tmp_path / "taken").write_text("")
    assert "taken is a file" in refusal(capsys, *command, "--out", str(tmp_path / "taken"))
    assert "argument --out: " in refusal(capsys, *command, "--out", str(tmp_path / "taken" / "below"))


@pytest.mark.parametrize("command", [["predict", "m", "x.png"], ["evaluate", "m", "--data", "shapes:"]])
def test_a_folder_that_cannot_be_made_is_refused_before_the_work_and_one_that_can_is_not_made_yet(capsys, tmp_path, command):
    assert re.search("argument --out: /proc/new/here cannot be written: ", refusal(capsys, *command, "--out", "/proc/new/here"))
    refusal(capsys, *command, "--out", str(tmp_path / "new" / "here"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train.epochs", "three"], "train.epochs must be a whole number, got 'three'"),
        (["--train.epochs", "0"], "train.epochs must be at least 1, got 0"),
        (["--data.augmentation", "mixup"], "data.augmentation must be .*'none', got 'mixup'"),
        (["--model.backbone.pretrained", "perhaps"], "model.backbone.pretrained must be true or false, got 'perhaps'"),
    ],
)
def test_a_value_that_is_not_allowed_ends_before_anything_is_written(capsys, tmp_path, flags, message):
    out = tmp_path / "run"
    assert re.search(message, refusal(capsys, "train", "solq-tiny", "--data", "shapes:", "--out", str(out), *flags))
    assert not out.exists()


def test_a_folder_that_is_not_there_is_named(capsys, tmp_path):
    message = refusal(capsys, "train", "solq-tiny", "--data", str(tmp_path / "missing"), "--out", str(tmp_path / "run"))
    assert str(tmp_path / "missing") in message
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_no_checkpoint_is_named(capsys, tmp_path):
    (tmp_path / "model.safetensors").write_text("not a model")
    message = refusal(capsys, "evaluate", str(tmp_path / "model.safetensors"), "--data", "shapes:")
    assert "model.safetensors is not a safetensors file" in message


def test_a_device_that_is_not_there_is_named(capsys, untrained):
    message = refusal(capsys, "evaluate", str(untrained), "--data", "shapes:", "--device", "quantum:1")
    assert "argument --device: device 'quantum:1' cannot be used" in message


def test_a_code_with_nothing_to_learn_is_not_fitted(capsys, tmp_path):
    assert "'dct' cannot be fitted" in refusal(capsys, "codecs", "fit", "dct", "shapes:", str(tmp_path / "code.safetensors"))
    assert "codecs fit, codecs compare" in refusal(capsys, "codecs")


def test_debug_shows_where_an_error_comes_from(capsys):
    code, _, error = answer(capsys, "show", "nothing", "--debug")
    assert code == 2
    assert error.startswith("Traceback")
    assert "there is no recipe, recipe.json or run folder 'nothing'" in error


@pytest.mark.parametrize("error", [ValueError("too many values to unpack"), KeyError("x"), RuntimeError("shapes differ")])
def test_any_other_error_is_a_bug_with_a_traceback_and_a_place_to_report_it(capsys, monkeypatch, error):
    def fails(_):
        raise error

    replace_command(monkeypatch, "recipes", fails)
    code, _, text = answer(capsys, "recipes")
    assert code == 1
    assert text.startswith("Traceback")
    assert text.splitlines()[-1].endswith("https://github.com/maskset/maskset/issues")


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_out_of_memory_names_a_setting_to_lower(capsys, monkeypatch, error):
    def fails(_):
        raise error

    replace_command(monkeypatch, "train", fails)
    message = refusal(capsys, "train", "solq-tiny", "--data", "shapes:", "--out", "run")
    assert message.startswith("out of memory. Lower --train.batch-size")


@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_RANK"])
def test_an_environment_variable_that_is_not_a_number_is_named(capsys, monkeypatch, tmp_path, name):
    monkeypatch.setenv(name, "abc")
    message = refusal(capsys, "train", "solq-tiny", "--data", "shapes:", "--out", str(tmp_path / "run"))
    assert re.match(f"the environment variable {name} must be a whole number, got 'abc'", message)


def test_a_negative_rank_means_that_there_is_one_process(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "-1")
    assert launched("LOCAL_RANK", 0) == 0


@pytest.mark.parametrize("flag", ["--limit", "--max-detections"])
@pytest.mark.parametrize("value", ["0", "-1", "many", "9" * 30])
def test_a_count_that_is_not_possible_is_refused_before_the_work(capsys, flag, value):
    command = ["predict", "m", "x.png"] if flag == "--limit" else ["evaluate", "m", "--data", "shapes:"]
    assert "must be a whole number, at least 1 and below 2^31" in refusal(capsys, *command, f"{flag}={value}")


def test_settings_nested_too_deep_are_refused(capsys, tmp_path):
    (tmp_path / "recipe.json").write_text("[" * 100_000)
    assert "recipe.json cannot be read as JSON settings" in refusal(capsys, "show", str(tmp_path / "recipe.json"))


def test_what_follows_two_hyphens_is_not_a_flag(capsys):
    _, options = cli.parse(["predict", "m", "--", "--help.png", "--debug"])
    assert options.sources == ["--help.png", "--debug"]


def test_an_error_of_several_lines_becomes_one(capsys, monkeypatch):
    def fails(_):
        raise MasksetError("first\n  second")

    replace_command(monkeypatch, "recipes", fails)
    assert refusal(capsys, "recipes") == "first second"


def test_an_error_of_the_file_system_names_the_file(capsys, monkeypatch):
    def fails(_):
        open("/nowhere/at/all")  # noqa: SIM115

    replace_command(monkeypatch, "recipes", fails)
    assert refusal(capsys, "recipes") == "No such file or directory: /nowhere/at/all"


def test_an_interruption_is_one_line_and_130(capsys, monkeypatch):
    def stops(_):
        raise KeyboardInterrupt("Continue with --resume.")

    replace_command(monkeypatch, "recipes", stops)
    assert answer(capsys, "recipes") == (130, "", "maskset: interrupted. Continue with --resume.\n")


def test_termination_is_one_line_and_143(capsys, monkeypatch):
    def stops(_):
        raise Terminated("Continue with --resume.")

    replace_command(monkeypatch, "recipes", stops)
    assert answer(capsys, "recipes") == (143, "", "maskset: terminated. Continue with --resume.\n")


@pytest.mark.parametrize("place", ["maskset.recipes.get", "maskset.training.train.train"])
def test_ctrl_c_before_training_says_that_nothing_was_written(capsys, monkeypatch, tmp_path, place):
    def stops(*_):
        raise KeyboardInterrupt

    if place.endswith("get"):
        monkeypatch.setattr(place, stops)
    else:  # an import takes seconds
        monkeypatch.setitem(sys.modules, "maskset.training.train", Stops("train"))
    code, _, error = answer(capsys, "train", "solq-tiny", "--data", "shapes:", "--out", str(tmp_path / "run"))
    assert (code, error) == (130, "maskset: interrupted. stopped before the first step: nothing was written.\n")


class Stops(ModuleType):
    """A module at whose import Ctrl-C comes."""

    def __getattr__(self, name):
        raise KeyboardInterrupt


def test_a_reader_that_goes_away_is_no_error():
    run = in_a_shell("$MASKSET --help | bash -c 'exec 0<&-; sleep 1'; echo ${PIPESTATUS[0]}")
    assert (run.stdout, run.stderr) == ("0\n", "")


def test_a_command_goes_on_when_the_reader_of_its_output_went_away(tmp_path):
    program = (
        "import sys, time; from dataclasses import replace; from maskset import cli\n"
        "def call(_):\n"
        "    for i in range(20): print('x' * 10_000, flush=True); time.sleep(0.01)\n"
        f"    open({str(tmp_path / 'done')!r}, 'w').close()\n"
        "cli.COMMANDS['recipes'] = replace(cli.COMMANDS['recipes'], call=call); sys.exit(cli.main(['recipes']))"
    )
    (tmp_path / "program.py").write_text(program)
    run = in_a_shell(f"{sys.executable} {tmp_path}/program.py | head -c 10; echo ${{PIPESTATUS[0]}}")
    assert (run.stdout, run.stderr) == ("xxxxxxxxxx0\n", "")
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize(
    ("redirection", "code", "message"),
    [
        (">&-", 0, ""),
        ("2>&-", 0, ""),
        (">/dev/full", 2, "maskset: error: No space left on device: standard output\n"),
        ("2>/dev/full", 0, ""),
    ],
)
def test_closed_and_full_streams(redirection, code, message):
    run = in_a_shell(f"$MASKSET --version {redirection}")
    assert (run.returncode, run.stderr) == (code, message)


def test_sigterm_ends_a_prediction_with_one_line_and_143(tmp_path, untrained):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index in range(500):
        Image.new("RGB", (64, 64)).save(pictures / f"{index}.png")
    command = [sys.executable, "-m", "maskset", "predict", str(untrained), str(pictures), "--out", str(tmp_path / "out")]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out/.unfinished/drawings/*.jpg")) and time.monotonic() < deadline:
        time.sleep(0.05)
    run.terminate()
    _, error = run.communicate(timeout=60)
    assert (run.returncode, error) == (143, "maskset: terminated.\n")
    assert not (tmp_path / "out" / "results.json").exists()
    assert not list(tmp_path.glob("out/**/.*"))


def test_recipes_are_listed_with_what_they_are_for(capsys):
    from maskset.recipes import RECIPES

    lines = answer(capsys, "recipes")[1].splitlines()
    assert [line.split()[0] for line in lines] == list(RECIPES)
    assert all(len(line.split()) > 3 for line in lines)


def test_the_help_of_convert_names_every_system_with_official_checkpoints():
    assert CONVERTIBLE.split(", ") == sorted(set(CONFIGS) - {"sextant"})


def test_a_recipe_is_shown_with_every_setting(capsys):
    output = answer(capsys, "show", "solq-tiny")[1]
    assert "--train.clip-norm" in output
    assert "maximum norm of the gradient" in output


def test_what_is_neither_a_recipe_nor_a_model_is_said_to_be_neither(capsys):
    assert "there is no recipe, recipe.json or run folder 'nosuch'" in refusal(capsys, "show", "nosuch")


def test_a_recipe_that_is_printed_as_json_can_be_trained(capsys, tmp_path):
    from maskset import recipes

    (tmp_path / "mine.json").write_text(answer(capsys, "show", "solq-small", "--json")[1])
    assert recipes.get(tmp_path / "mine.json") == recipes.get("solq-small")


def test_a_model_is_shown_with_its_classes_and_license(capsys, untrained):
    output = answer(capsys, "show", str(untrained))[1]
    assert "classes: ellipse, rectangle, triangle\n" in output
    assert "license: Apache-2.0\n" in output
    assert "--model.backbone" in output


def test_pictures_are_predicted_into_a_folder(capsys, tmp_path, untrained):
    Image.new("RGB", (90, 60), "white").save(tmp_path / "empty.png")
    out = tmp_path / "predictions"
    code, output, _ = answer(capsys, "predict", str(untrained), str(tmp_path), "--out", str(out), "--save", "drawings", "labels")
    assert code == 0
    assert sorted(str(file.relative_to(out)) for file in out.rglob("*.*")) == [
        "drawings/empty.jpg",
        "labels/empty.png",
        "results.json",
    ]
    assert str(out / "results.json") in output


def test_one_unreadable_picture_is_left_out_on_request_and_the_others_are_written(capsys, tmp_path, untrained):
    Image.new("RGB", (90, 60), "white").save(tmp_path / "empty.png")
    (tmp_path / "broken.png").write_text("no picture")
    out = tmp_path / "predictions"
    command = ["predict", str(untrained), str(tmp_path), "--out", str(out)]
    code, _, error = answer(capsys, *command)
    assert code == 2
    assert "--skip-broken" in error
    assert not (out / "results.json").exists()
    code, _, error = answer(capsys, *command, "--skip-broken")
    assert (code, (out / "results.json").exists()) == (0, True)
    assert "1 of 2 images" in error
    assert "broken.png" in error


def test_a_model_is_evaluated_on_a_data_folder(capsys, tmp_path, untrained):
    from maskset.data import shapes

    shapes.write(tmp_path / "data", {"val": 2})
    code, output, _ = answer(capsys, "evaluate", str(untrained), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"))
    assert code == 0
    assert "AP50" in output
    assert (tmp_path / "out" / "metrics.json").exists()
    assert (tmp_path / "out" / "per_class.csv").exists()


@pytest.mark.slow  # by default a SIGTERM to the whole group is tested, in training/test_reliability.py
def test_ctrl_c_while_training_ends_with_130_and_something_to_resume(tmp_path):
    out = tmp_path / "run"
    flags = ["--data.workers", "0", "--train.log-every", "1", "--train.batch-size", "1"]
    command = [sys.executable, "-m", "maskset", "train", "solq-tiny", "--data", "shapes:", "--out", str(out), *flags]
    run = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert run.stdout is not None
    deadline = time.monotonic() + 60
    for line in run.stdout:
        if "step 2/" in line or time.monotonic() > deadline:
            break
    run.send_signal(signal.SIGINT)
    _, error = run.communicate(timeout=60)
    assert run.returncode == 130, error
    assert error.startswith("maskset: interrupted.")
    assert error.count("\n") == 1
    assert (out / "last.safetensors").exists()
