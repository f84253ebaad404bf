"""Time and memory are counted as they are said to be."""

import time

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import measure


def test_ways_take_turns_and_the_first_call_of_each_does_not_count():
    calls = []
    times = measure.in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, seconds=1e-9)
    assert calls == ["a", "b"] * 4
    assert [len(rounds) for rounds in times.values()] == [3, 3]


def test_without_time_every_way_is_called_once():
    calls = []
    measure.in_turn({"a": lambda: calls.append("a")}, seconds=0)
    assert calls == ["a"]


def test_a_call_takes_the_time_that_it_takes():
    (duration,) = measure.in_turn({"sleep": lambda: time.sleep(0.02)}, seconds=0)["sleep"]
    assert 0.02 <= duration < 1


def test_the_peak_counts_what_is_alive_at_once_and_not_what_was_there_before():
    tensor = torch.zeros(2**20)

    def one_after_the_other():
        for _ in range(3):
            (tensor + 1).sum()

    def together():
        return [tensor + 1 for _ in range(3)]

    peaks = measure.peaks({"after": one_after_the_other, "together": together})
    assert peaks["after"] == pytest.approx(4, abs=0.1)
    assert peaks["together"] == pytest.approx(12, abs=0.1)


def _grown(mebibytes: int) -> tuple[float, float, int]:
    before, _ = measure.resident()
    torch.ones(mebibytes * 2**18)
    after, peak = measure.resident()
    return peak - before, after - before, torch.get_num_threads()


def test_the_greatest_memory_of_a_process_is_seen_after_it_was_given_back():
    peak, after, threads = measure.in_new_process(_grown, 200)
    assert 190 < peak < 300
    assert after < 100
    assert threads == torch.get_num_threads()


def test_the_profiler_still_lists_allocations_under_its_private_name(monkeypatch):
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")  # it is read once in a process: later tests expect that nothing is logged
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        tensor = torch.zeros(2**20)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert tensor.nbytes in [event.nbytes() for event in events]
    assert all(event.start_ns() > 0 for event in events)
