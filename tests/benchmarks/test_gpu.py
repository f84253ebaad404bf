"""The checks of a GPU, rehearsed on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu, page
from benchmarks.__main__ import main
from benchmarks.gpu import Outcome

ROOT = Path(__file__).parents[2]


def check_with(monkeypatch, *named_checks) -> None:
    monkeypatch.setattr(gpu, "checks", lambda *_: named_checks)


def broken() -> Outcome:
    raise RuntimeError("no kernel image is available")


def test_the_quick_rehearsal_passes_and_writes_each_check(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "usable", lambda device: ["c", "gather"])  # Triton's interpreter needs a process of its own
    assert gpu.run("cpu", quick=True, out=tmp_path) == 0
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert content["command"] == "python -m benchmarks gpu --device cpu --quick"
    names = [check["check"] for check in content["checks"]]
    assert {"attention, c, bfloat16", "attention, gather, float32", "DDP in one process, gradients", "peak memory, SOLQ"} <= {
        *names
    }
    assert all(check["passed"] for check in content["checks"])
    assert capsys.readouterr().out.count("passed  ") == len(names)


def test_a_check_that_fails_does_not_stop_the_others(monkeypatch, capsys, tmp_path):
    too_far, good = lambda: Outcome(2.0, 1.0), lambda: Outcome(0.5, 1.0, "fine")
    check_with(monkeypatch, ("broken", broken), ("far", too_far), ("nan", lambda: Outcome(float("nan"), 1.0)), ("good", good))
    assert gpu.run("cpu", quick=True, out=tmp_path) == 1
    output = capsys.readouterr().out
    assert "1 of 4 checks passed" in output
    assert "failed: broken, far, nan" in output
    rows = json.loads((tmp_path / "gpu.json").read_text())["checks"]
    assert [row["passed"] for row in rows] == [False, False, False, True]
    assert "no kernel image is available" in rows[0]["detail"]


def test_checks_beyond_the_time_limit_are_not_run_and_count_as_failed(monkeypatch, capsys):
    check_with(monkeypatch, ("late", lambda: pytest.fail("it ran")))
    monkeypatch.setattr(gpu, "LIMIT", -1)
    assert gpu.run("cuda", quick=True, out=None) == 1
    assert "not run" in capsys.readouterr().out


def test_without_a_gpu_the_rehearsal_is_suggested(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["gpu"]) == 2
    assert "--device cpu rehearses the checks" in capsys.readouterr().err


def test_the_page_lists_the_checks_of_a_gpu(monkeypatch, tmp_path):
    check_with(monkeypatch, ("attention, triton, float32", lambda: Outcome(1e-6, 2e-5)), ("broken", broken))
    gpu.run("cpu", quick=True, out=tmp_path / "results")
    page.write(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "## [gpu](results/gpu.json)" in text
    assert "1 of 2 checks passed" in text
    assert "| attention, triton, float32 | passed " in text
    assert "| broken                     | failed " in text


@pytest.mark.slow
def test_the_whole_rehearsal_passes(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "gpu", "--device", "cpu", "--out", tmp_path]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout
