"""Measurement of time and memory of several implementations, which take turns in one process."""

import importlib.util
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from maskset.errors import ConfigError

Result = TypeVar("Result")
Implementation = Callable[[], Any]

_LEAST_ROUNDS, _MOST_ROUNDS = 3, 30
_LONG = 10  # seconds of a round
MOST_SECONDS: float | None = None  # a shorter time than benchmarks ask for, where many run one after the other


def require(*packages: str) -> None:
    """Raise a ConfigError unless the packages that a benchmark compares with are installed.

    Raises:
        ConfigError: one is not.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"this benchmark compares with {' and '.join(missing)}: pip install 'maskset[bench]'.")


def in_turn(implementations: Mapping[str, Implementation], seconds: float) -> dict[str, list[float]]:
    """Return the duration of each call of each implementation, in seconds.

    The implementations take turns, so that other load on the machine slows all of them. The first round is not counted unless it
    takes more than 10 seconds. There are 3 to 30 rounds, and no new one after `seconds`; if that is 0, there is one round.
    """
    seconds = seconds if MOST_SECONDS is None else min(seconds, MOST_SECONDS)
    times: dict[str, list[float]] = {
        name: [_timed(implementation)] if seconds else [] for name, implementation in implementations.items()
    }
    if sum(map(sum, times.values())) < _LONG:
        times = {name: [] for name in implementations}
    start = time.perf_counter()
    while True:
        for name, implementation in implementations.items():
            times[name].append(_timed(implementation))
        rounds = min(map(len, times.values()))
        enough = time.perf_counter() - start >= seconds and (rounds >= _LEAST_ROUNDS or not seconds)
        if enough or rounds == _MOST_ROUNDS:
            return times


def _timed(implementation: Implementation) -> float:
    start = time.perf_counter()
    implementation()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peaks(implementations: Mapping[str, Implementation]) -> dict[str, float]:
    """Return the increase of the memory of tensors in one call of each implementation, MiB."""
    return {name: _peak(implementation) / 2**20 for name, implementation in implementations.items()}


def _peak(implementation: Implementation) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        implementation()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler writes to stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = implementation()  # kept until the end: its memory belongs to the call
    del result
    now = highest = 0
    found: Any = profiler.profiler
    events = [event for event in found.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest


def in_new_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """Return `function(*arguments)`, computed in a fresh process with as many threads as this one.

    The greatest resident memory of a process is that of all that it did, so each thing to measure needs one of its own.
    """
    with multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, [torch.get_num_threads()]) as pool:
        return pool.apply(function, arguments)


def resident() -> tuple[float, float]:
    """Return the resident memory of this process and the greatest so far, MiB, as Linux counts them; on a GPU that of tensors."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 2**20, torch.cuda.max_memory_allocated() / 2**20
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now, greatest = (int(lines[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))
    return now, greatest
