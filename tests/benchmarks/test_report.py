"""Ratios, files and the page that is made of them."""

import json
import re
import subprocess
import time
from pathlib import Path

import pytest

import maskset
from benchmarks import BENCHMARKS, page
from benchmarks.report import Disagreement, Report, save

ROOT = Path(__file__).parents[2]


def report(measured: float | None = 4.0) -> Report:
    """Return a report of a case with a baseline of 8 ms and 100 MiB."""
    made = Report("matching", "What is compared.")
    made.agree("both", 0.0, 1e-4)
    times = {"baseline": [0.008, 0.007, 0.02], "ours": [0.002, 0.002, 0.001]}
    made.compare("case", "baseline", times, {"baseline": 100.0, "ours": 50.0})
    made.target("a | ratio", 3, measured, "" if measured else "no GPU")
    return made


def result(**changed) -> dict:
    return json.loads(json.dumps(report().to_dict("python -m benchmarks matching --out benchmarks", time.monotonic()))) | changed


def test_ratios_are_those_of_the_medians():
    made = report()
    assert made.speedup("case", "ours") == made.speedup("case", "ours", "baseline") == pytest.approx(4)
    assert made.memory_saving("case", "ours") == made.memory_saving("case", "ours", "baseline") == pytest.approx(2)
    assert made.speedup("case", "baseline", "ours") == pytest.approx(1 / 4)
    assert (
        made.speedup("case", "nobody") is made.speedup("another case", "ours") is made.speedup("case", "ours", "nobody") is None
    )


@pytest.mark.parametrize("difference", [1.0, float("nan")])
def test_a_difference_that_is_too_great_or_unknown_is_refused(difference):
    with pytest.raises(Disagreement, match="codes: they differ by"):
        Report("x", "").agree("codes", difference, 0.5)


def test_a_result_says_where_it_comes_from():
    record = result()
    assert record["machine"]["cores"] > 0
    assert re.fullmatch(r"[0-9a-f]{7,}(-dirty)?|unknown", record["commit"])
    assert record["versions"].keys() >= {"torch", "transformers", "pycocotools"}


def test_the_commit_of_a_repository_that_does_not_track_the_source_is_not_reported(tmp_path, monkeypatch):
    for words in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-q", "--allow-empty", "-m", "other"],
    ):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    installed = tmp_path / "site-packages" / "maskset" / "__init__.py"
    installed.parent.mkdir(parents=True)
    installed.touch()
    monkeypatch.setattr(maskset, "__file__", str(installed))
    assert result()["commit"] == "unknown"


@pytest.mark.parametrize(("changed", "name"), [({}, "matching"), ({"threads": 2}, "matching-2-threads")])
def test_each_number_of_threads_and_a_gpu_have_a_file_of_their_own(tmp_path, changed, name):
    assert save(result(**changed), tmp_path / "results") == tmp_path / "results" / f"{name}.json"
    on_gpu = result(machine={**result()["machine"], "gpu": "H200"})
    assert save(on_gpu, tmp_path / "results").name == "matching-gpu.json"


def test_the_page_shows_bars_figures_and_other_files(tmp_path):
    save(result(), tmp_path / "results")
    (tmp_path / "results" / "codecs.json").write_text(json.dumps({"command": "maskset codecs compare DATA", "scores": []}))
    page.write(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert re.search(r"\| a \\\| ratio +\| +3\.00x \| \*\*4\.00x\*\* +\| `python -m benchmarks matching` ", text)
    assert re.search(r"\| ours +\| +2\.00 \(1\.00\) \| +4\.00 \| +50\.0 \| +2\.00 \|", text)
    assert "`maskset codecs compare DATA`" in text


@pytest.mark.parametrize("content", ["3", '["benchmark"]', '{"benchmark": "another program\'s"}'])
def test_a_file_of_another_program_does_not_spoil_the_page(tmp_path, content):
    save(result(), tmp_path / "results")
    (tmp_path / "results" / "other.json").write_text(content)
    page.write(tmp_path)
    page.check(tmp_path)
    assert "**4.00x**" in (tmp_path / "README.md").read_text()


def test_a_bar_that_could_not_be_measured_says_why():
    (table, _) = page.summary([json.loads(json.dumps(report(None).to_dict("python -m benchmarks matching", time.monotonic())))])
    assert "not measured here (no GPU)" in table


def test_the_committed_page_is_made_from_the_committed_results():
    expected = page.page(page.read(ROOT / "benchmarks" / "results"))
    assert (ROOT / "benchmarks" / "README.md").read_text() == expected, "run `python -m benchmarks.page`"


def test_the_readme_shows_the_measured_headline_figures():
    readme = (ROOT / "README.md").read_text()
    for figure in page.headlines(page.read(ROOT / "benchmarks" / "results")):
        assert f"**{figure}**" in readme


def test_curves_of_the_documentation_are_those_that_were_measured_last():
    drawn, published = ROOT / "benchmarks" / "scaling.svg", ROOT / "docs" / "assets" / "scaling.svg"
    assert drawn.exists() == published.exists()
    assert not drawn.exists() or drawn.read_bytes() == published.read_bytes(), "make bench copies them"


def test_make_bench_runs_every_benchmark():
    loop = re.search(r"for name in (.*); do", (ROOT / "Makefile").read_text())
    assert loop is not None
    assert loop[1].split() == list(BENCHMARKS)


def test_curves_are_drawn_from_figures_alone(tmp_path):
    from benchmarks import scaling

    made = Report("scaling", "")
    made.compare("inference, slots", None, {"100": [0.1], "300": [0.2]}, {"100": 10.0, "300": 20.0})
    made.compare("loss, slots", None, {"100": [0.1], "300": [0.2]}, {"100": 10.0, "300": 20.0})
    content = made.to_dict("", time.monotonic())
    first = scaling.draw(content, tmp_path).read_bytes()
    assert first == scaling.draw(content, tmp_path).read_bytes()
    assert b"<svg" in first
