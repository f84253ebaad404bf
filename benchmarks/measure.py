"""How time and memory are measured: several ways of doing the same, in turn, in one process."""

import importlib.util
import multiprocessing
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from maskset.errors import ConfigError

Result = TypeVar("Result")
Way = Callable[[], Any]

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


def in_turn(ways: Mapping[str, Way], seconds: float) -> dict[str, list[float]]:
    """Return how long each call of each way took, in seconds.

    The ways take turns, so that whatever else the machine does slows all of them. One call of each comes first, and is not
    counted unless a round takes so long that what is only done once weighs little. There are 3 to 30 rounds, and no new one
    after `seconds`; where that is 0, one call of each is all.
    """
    seconds = seconds if MOST_SECONDS is None else min(seconds, MOST_SECONDS)
    times: dict[str, list[float]] = {name: [_timed(way)] if seconds else [] for name, way in ways.items()}
    if sum(map(sum, times.values())) < _LONG:
        times = {name: [] for name in ways}
    start = time.perf_counter()
    while True:
        for name, way in ways.items():
            times[name].append(_timed(way))
        rounds = min(map(len, times.values()))
        enough = time.perf_counter() - start >= seconds and (rounds >= _LEAST_ROUNDS or not seconds)
        if enough or rounds == _MOST_ROUNDS:
            return times


def _timed(way: Way) -> float:
    start = time.perf_counter()
    way()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peaks(ways: Mapping[str, Way]) -> dict[str, float]:
    """Return by how many MiB of tensors PyTorch's allocator rises above its start in one call of each way."""
    return {name: _peak(way) / 2**20 for name, way in ways.items()}


def _peak(way: Way) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = way()  # kept until the end: its memory belongs to the call
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
