"""The report of a benchmark: which results agree, time and memory of each implementation, and which targets are met."""

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

import maskset
from maskset.files import atomic_write

_PACKAGES = ("maskset", "torch", "torchvision", "timm", "transformers", "numpy", "pycocotools", "faster-coco-eval", "triton")


class Disagreement(ValueError):
    """Two ways that should compute the same do not, so there is nothing to compare."""


@dataclass(frozen=True)
class Agreement:
    """How far two ways are apart that should compute the same.

    Attributes:
        what: which results of which ways.
        difference: how far they are apart.
        allowed: how far they may be apart.
    """

    what: str
    difference: float
    allowed: float


@dataclass(frozen=True)
class Figure:
    """What one way costs in one case.

    Attributes:
        case: what is computed, on which input.
        way: who computes it, or how.
        milliseconds: median of all rounds; None where only memory is told.
        best_milliseconds: of the fastest round.
        rounds: how many there were.
        peak_mib: the greatest memory, MiB; None where only time is told.
        speedup: time of the baseline divided by this one's.
        memory_saving: memory of the baseline divided by this one's.
    """

    case: str
    implementation: str
    milliseconds: float | None
    best_milliseconds: float | None
    rounds: int
    peak_mib: float | None
    speedup: float | None
    memory_saving: float | None


@dataclass(frozen=True)
class Target:
    """A ratio to a baseline, with the least value that it must have.

    Attributes:
        comparison: the ratio that is meant.
        required: the least value.
        measured: the value; None if it cannot be measured here.
        note: why it is None, or why the target is missed.
    """

    comparison: str
    required: float
    measured: float | None
    note: str = ""


@dataclass
class Report:
    """What a benchmark found, as far as it has come; it tells every part when it is added.

    Attributes:
        benchmark: its name.
        about: what is compared, on which input.
        threads: of the CPU.
    """

    benchmark: str
    about: str
    threads: int = 1
    agreements: list[Agreement] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Add something that the reader must know."""
        self.notes.append(text)
        print(text, flush=True)

    def agree(self, what: str, difference: float, allowed: float) -> None:
        """Add that two ways compute the same.

        Raises:
            Disagreement: they are further apart than allowed.
        """
        if not difference <= allowed:  # also if it is NaN
            raise Disagreement(f"{what}: they differ by {difference:.3g}, allowed is {allowed:.3g}.")
        self.agreements.append(Agreement(what, float(difference), float(allowed)))
        print(f"agree: {what}, difference {difference:.2g} (allowed {allowed:.2g})", flush=True)

    def compare(
        self, case: str, baseline: str | None, times: Mapping[str, Sequence[float]], peaks: Mapping[str, float] | None = None
    ) -> None:
        """Add what each way costs in a case.

        Args:
            case: what is computed, on which input.
            baseline: the implementation that the others are compared with; None if they do not compute the same.
            times: seconds of each round of each way; may be empty where only memory is told.
            peaks: greatest memory of each way, MiB.
        """
        peaks = peaks or {}
        for way in times or peaks:
            rounds, peak = times.get(way, ()), peaks.get(way)
            usual, least = (median(rounds), min(rounds)) if rounds else (None, None)
            speedup = median(times[baseline]) / usual if baseline and times.get(baseline) and usual else None
            memory_saving = peaks[baseline] / peak if baseline and baseline in peaks and peak else None
            self.figures.append(Figure(case, way, _thousand(usual), _thousand(least), len(rounds), peak, speedup, memory_saving))
            parts = [] if usual is None else [f"{1000 * usual:.4g} ms ({len(rounds)} rounds)"]
            parts += [] if peak is None else [f"{peak:.4g} MiB"]
            print(f"{case}: {way}: {', '.join(parts)}", flush=True)

    def figure(self, case: str, way: str) -> Figure | None:
        """Return what a way costs in a case, None if that was not measured."""
        return next((one for one in self.figures if (one.case, one.implementation) == (case, way)), None)

    def speedup(self, case: str, way: str, baseline: str | None = None) -> float | None:
        """Return the speed-up over the case's baseline, or over another implementation; None if it was not measured."""
        one, other = self.figure(case, way), self.figure(case, baseline) if baseline else None
        if baseline is None or one is None:
            return one.speedup if one else None
        return other.milliseconds / one.milliseconds if other and other.milliseconds and one.milliseconds else None

    def memory_saving(self, case: str, way: str, baseline: str | None = None) -> float | None:
        """Return the memory saving over the case's baseline, or over another implementation; None if it was not measured."""
        one, other = self.figure(case, way), self.figure(case, baseline) if baseline else None
        if baseline is None or one is None:
            return one.memory_saving if one else None
        return other.peak_mib / one.peak_mib if other and other.peak_mib and one.peak_mib else None

    def target(self, comparison: str, required: float, measured: float | None, note: str = "") -> None:
        """Add a target and the measured value."""
        self.targets.append(Target(comparison, required, measured, note))

    def to_dict(self, command: str, start: float) -> dict[str, Any]:
        """Return everything with where it was measured, for JSON.

        Args:
            command: what measures it again.
            start: when it began, as `time.monotonic` counts.
        """
        content = asdict(self)
        head = {name: content.pop(name) for name in ("benchmark", "about")}
        return _rounded({**head, "command": command, **where(), "minutes": (time.monotonic() - start) / 60, **content})


def where() -> dict[str, Any]:
    """Return the commit, the machine and the versions that something was measured with, for JSON."""
    return {"commit": _commit(), "machine": _machine(), "versions": _versions()}


def save(result: Mapping[str, Any], folder: Path) -> Path:
    """Write a result into a folder, whole or not at all, and return the file's path.

    Each number of threads, and a GPU, have a file of their own.
    """
    name = result["benchmark"]
    if result["machine"]["gpu"]:
        name += "-gpu"
    elif result["threads"] > 1:
        name += f"-{result['threads']}-threads"
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / f"{name}.json") as part:
        part.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return folder / f"{name}.json"


def _thousand(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds


def _rounded(value: Any) -> Any:
    """Return the value with five digits of every number: more is noise."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list) else value


def _machine() -> dict[str, Any]:
    return {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    """Return the commit of the source that runs, with "-dirty" if it has changed since.

    "unknown" if no repository tracks the source, for example if it is installed in an environment inside of another repository.
    """
    source = Path(maskset.__file__)

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=True, cwd=source.parent).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", source.name)
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
