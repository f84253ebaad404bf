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
    """Two implementations that should agree do not, so their costs cannot be compared."""


@dataclass(frozen=True)
class Agreement:
    """The difference of the results of two implementations that should agree.

    Attributes:
        what: results and implementations that are compared.
        difference: their difference.
        allowed: the allowed difference.
    """

    what: str
    difference: float
    allowed: float


@dataclass(frozen=True)
class Figure:
    """The cost of one implementation in one case.

    Attributes:
        case: the computation and its input.
        implementation: name of the implementation.
        milliseconds: median of all rounds; None if only memory was measured.
        best_milliseconds: time of the fastest round.
        rounds: number of rounds.
        peak_mib: peak memory, MiB; None if only time was measured.
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
    """A ratio to a baseline and its required minimum.

    Attributes:
        comparison: description of the ratio.
        required: the minimum.
        measured: the value; None if it cannot be measured on this machine.
        note: the reason why it is None, or why the target is missed.
    """

    comparison: str
    required: float
    measured: float | None
    note: str = ""


@dataclass
class Report:
    """The results of a benchmark so far; each is printed when it is added.

    Attributes:
        benchmark: name of the benchmark.
        about: description of the comparison.
        threads: number of CPU threads.
    """

    benchmark: str
    about: str
    threads: int = 1
    agreements: list[Agreement] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Add a remark for the reader."""
        self.notes.append(text)
        print(text, flush=True)

    def agree(self, what: str, difference: float, allowed: float) -> None:
        """Add the difference of two implementations.

        Raises:
            Disagreement: it is greater than allowed.
        """
        if not difference <= allowed:  # NaN is not allowed either
            raise Disagreement(f"{what}: they differ by {difference:.3g}, allowed is {allowed:.3g}.")
        self.agreements.append(Agreement(what, float(difference), float(allowed)))
        print(f"agree: {what}, difference {difference:.2g} (allowed {allowed:.2g})", flush=True)

    def compare(
        self, case: str, baseline: str | None, times: Mapping[str, Sequence[float]], peaks: Mapping[str, float] | None = None
    ) -> None:
        """Add the cost of each implementation in a case.

        Args:
            case: the computation and its input.
            baseline: the implementation that the others are compared with; None if they compute different results.
            times: seconds of each round of each implementation; may be empty if only memory was measured.
            peaks: peak memory of each implementation, MiB.
        """
        peaks = peaks or {}
        for implementation in times or peaks:
            rounds, peak = times.get(implementation, ()), peaks.get(implementation)
            middle, fastest = (median(rounds), min(rounds)) if rounds else (None, None)
            speedup = median(times[baseline]) / middle if baseline and times.get(baseline) and middle else None
            memory_saving = peaks[baseline] / peak if baseline and baseline in peaks and peak else None
            self.figures.append(
                Figure(case, implementation, _thousand(middle), _thousand(fastest), len(rounds), peak, speedup, memory_saving)
            )
            parts = [] if middle is None else [f"{1000 * middle:.4g} ms ({len(rounds)} rounds)"]
            parts += [] if peak is None else [f"{peak:.4g} MiB"]
            print(f"{case}: {implementation}: {', '.join(parts)}", flush=True)

    def figure(self, case: str, implementation: str) -> Figure | None:
        """Return the cost of an implementation in a case; None if it was not measured."""
        return next((figure for figure in self.figures if (figure.case, figure.implementation) == (case, implementation)), None)

    def speedup(self, case: str, implementation: str, baseline: str | None = None) -> float | None:
        """Return the speed-up over the case's baseline, or over another implementation; None if it was not measured."""
        figure, other = self.figure(case, implementation), self.figure(case, baseline) if baseline else None
        if baseline is None or figure is None:
            return figure.speedup if figure else None
        return other.milliseconds / figure.milliseconds if other and other.milliseconds and figure.milliseconds else None

    def memory_saving(self, case: str, implementation: str, baseline: str | None = None) -> float | None:
        """Return the memory saving over the case's baseline, or over another implementation; None if it was not measured."""
        figure, other = self.figure(case, implementation), self.figure(case, baseline) if baseline else None
        if baseline is None or figure is None:
            return figure.memory_saving if figure else None
        return other.peak_mib / figure.peak_mib if other and other.peak_mib and figure.peak_mib else None

    def target(self, comparison: str, required: float, measured: float | None, note: str = "") -> None:
        """Add a target and the measured value."""
        self.targets.append(Target(comparison, required, measured, note))

    def to_dict(self, command: str, start: float) -> dict[str, Any]:
        """Return everything, with commit and machine, for JSON.

        Args:
            command: the command that repeats the benchmark.
            start: start of the benchmark, from `time.monotonic`.
        """
        content = asdict(self)
        head = {name: content.pop(name) for name in ("benchmark", "about")}
        return _rounded({**head, "command": command, **where(), "minutes": (time.monotonic() - start) / 60, **content})


def where() -> dict[str, Any]:
    """Return the commit, the machine and the versions of packages, for JSON."""
    return {"commit": _commit(), "machine": _machine(), "versions": _versions()}


def save(result: Mapping[str, Any], folder: Path) -> Path:
    """Write a result into a folder and return its path. Each number of threads, and a GPU, has its own file."""
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
    """Return the value with all numbers rounded to five digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list) else value


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
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


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
