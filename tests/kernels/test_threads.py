"""Work of the C library that threads share."""

import threading

import pytest
import torch

from maskset.kernels import library


@pytest.fixture
def _three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_three_threads")
def test_ranges_are_disjoint_and_make_up_the_whole():
    seen, lock = [], threading.Lock()

    def work(first: int, end: int) -> None:
        with lock:
            seen.extend(range(first, end))

    for items in (0, 1, 2, 3, 4, 100):
        seen.clear()
        library.parallel_for(work, items)
        assert sorted(seen) == list(range(items))


@pytest.mark.usefixtures("_three_threads")
def test_where_one_range_fails_the_others_are_waited_for():
    failed, done = threading.Event(), []

    def work(first: int, end: int) -> None:
        if first == 0:
            failed.set()
            raise MemoryError("first range")
        failed.wait()
        threading.Event().wait(0.05)
        done.append(first)

    with pytest.raises(MemoryError, match="first range"):
        library.parallel_for(work, 3)
    assert sorted(done) == [1, 2]
