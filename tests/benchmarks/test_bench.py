"""Every benchmark runs in its quick form, and what it computes is what its peers compute."""

from dataclasses import replace

import pytest
import torch

from benchmarks import BENCHMARKS, measure
from benchmarks.__main__ import main
from benchmarks.report import Disagreement, Report
from benchmarks.run import run


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("inference", "training"))) for name in BENCHMARKS]
)
@pytest.mark.filterwarnings("ignore")  # other packages warn as they like
def test_a_quick_benchmark_finds_that_results_agree_and_writes_nothing(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([name, "--quick"]) == 0
    output = capsys.readouterr().out
    assert "the results agree" in output
    assert ("agree: " in output) == (name != "scaling")  # which has nobody to agree with
    assert not list(tmp_path.iterdir())


def test_ways_that_differ_are_not_compared(monkeypatch):
    from benchmarks import matching

    monkeypatch.setattr(matching, "giou_cost", lambda boxes, targets: torch.zeros(()))
    with pytest.raises(Disagreement, match="costs of all slots and objects, absolute: they differ by"):
        run("matching", quick=True)


def test_a_gradient_that_is_no_number_is_no_agreement():
    from benchmarks import attention

    def broken(sample: attention.Sample) -> torch.Tensor:
        locations = sample.locations * 1
        locations.register_hook(lambda gradient: gradient * torch.nan)
        return attention.ours("reference", replace(sample, locations=locations))

    ways = {attention.BASELINE: attention.transformers_attention, "broken": broken}
    with pytest.raises(Disagreement, match="broken.*they differ by nan"):
        attention.measure(Report("attention", "", 1), "decoder", attention.sample((64, 96), 1, 20, "cpu"), ways, 0)


@pytest.mark.parametrize(("name", "missing"), [("inference", "transformers"), ("scaling", "matplotlib")])
def test_a_package_that_is_missing_is_named_with_what_installs_it(name, missing, monkeypatch, capsys):
    monkeypatch.setattr(measure.importlib.util, "find_spec", lambda name: None)
    assert main([name, "--quick"]) == 2
    assert f"{missing}: pip install 'maskset[bench]'" in capsys.readouterr().err


def test_what_works_here_is_told_also_without_the_package_to_compare_with(monkeypatch, capsys):
    monkeypatch.setattr(measure.importlib.util, "find_spec", lambda name: None)
    assert main(["attention", "--quick"]) == 2
    output = capsys.readouterr()
    assert "Implementation bag: works here." in output.out
    assert "compares with transformers: pip install 'maskset[bench]'" in output.err


def test_a_choice_in_the_environment_is_part_of_the_command(monkeypatch, capsys):
    monkeypatch.setenv("MASKSET_NATIVE", "off")
    run("matching", quick=True)
    assert "`MASKSET_NATIVE=off python -m benchmarks matching --quick`" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--threads", "0"], "--threads must be at least 1, got 0."),
        (["--images", "0"], "--images must be at least 1, got 0."),
        (["--quick", "--out", "here"], "leave out --quick or --out"),
    ],
)
def test_what_cannot_be_measured_is_refused(flags, message, capsys):
    assert main(["evaluation", *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("README.md", "# My project", "README.md would be overwritten, and is not a page of benchmarks: choose another folder"),
        ("results/half.json", '{"targets": [', "half.json is not JSON"),
    ],
)
def test_a_folder_that_cannot_be_written_anew_is_refused_before_the_work(file, content, message, tmp_path, capsys):
    (tmp_path / "results").mkdir()
    (tmp_path / file).write_text(content)
    assert main(["matching", "--out", str(tmp_path)]) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert "agree" not in output.out
    assert (tmp_path / file).read_text() == content


def test_only_evaluation_has_a_number_of_images(capsys):
    with pytest.raises(SystemExit) as end:
        main(["twin", "--images", "5"])
    assert end.value.code == 2
    assert "--images is an option of `evaluation` only" in capsys.readouterr().err
