"""The C library: built when maskset is installed, if there is a C compiler; everything works without it, slower.

The library takes pointers and knows nothing of Python or torch, so that one build supports every version of both. Functions work
on a range of their items; `parallel_for` gives the ranges to threads.
"""

import ctypes
import importlib.util
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from maskset.errors import MasksetError

NATIVE_ENV = "MASKSET_NATIVE"  # this environment variable, "on" or "off", hides the library where it is "off"


def _load() -> ctypes.CDLL | str:
    """Return the library, or why there is none."""
    found = importlib.util.find_spec("maskset.kernels._kernels")
    if found is None or found.origin is None:
        again = "pip install --force-reinstall --no-deps ."
        return f"it was not built, for want of a C compiler: install one, then maskset again with `{again}` where its source is"
    try:
        return ctypes.CDLL(found.origin)
    except OSError as error:
        return f"it cannot be loaded ({error})"


_loaded = _load()  # at once: torch.compile could not look into the loading


def handle() -> ctypes.CDLL | None:
    """Return the C library; None where it cannot or shall not be used."""
    return None if isinstance(_loaded, str) or _hidden() else _loaded


def unavailable_reason() -> str | None:
    """Return why the library cannot be used; None if it can."""
    if _hidden():
        return f"{NATIVE_ENV}=off hides it"
    return _loaded if isinstance(_loaded, str) else None


def _hidden() -> bool:
    """Return whether the user hides the library.

    Raises:
        ValueError: the variable is neither on nor off.
    """
    choice = os.environ.get(NATIVE_ENV) or "on"
    if choice not in ("on", "off"):
        raise MasksetError(f"{NATIVE_ENV} is {choice!r}, it must be on or off, which hides the C library.")
    return choice == "off"


def supports(device: torch.device) -> bool:
    """Return whether the library can work on what lies on a device."""
    return device.type == "cpu" and handle() is not None


def function(name: str) -> Callable[..., int]:
    """Return a function of the library. It takes contiguous CPU tensors (by address), whole numbers (ptrdiff_t) and structures.

    The library must be there, see `handle`. Every C function that is called so returns ptrdiff_t or nothing.
    """
    loaded = handle()
    assert loaded is not None
    called = loaded[name]
    called.restype = ctypes.c_ssize_t
    return lambda *arguments: called(*map(_passed, arguments))


def address(tensor: Tensor) -> int:
    """Return where the numbers of a tensor begin, which the caller keeps alive.

    Raises:
        ValueError: it has gaps, or is not on the CPU.
    """
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise MasksetError(f"C takes tensors on the CPU without gaps, got strides {tensor.stride()} on {tensor.device}.")
    return tensor.data_ptr()


def _passed(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(address(argument))
    return ctypes.c_ssize_t(argument) if isinstance(argument, int) else argument


def parallel_for(work: Callable[[int, int], Any], items: int, least: int = 1) -> None:
    """Call `work(first, end)` for ranges that make up 0 to `items`, one for each thread that torch may use.

    Args:
        work: calls a function of the library, which gives up the interpreter's lock.
        items: how many there are.
        least: what a thread should get at the least; fewer items are not worth it.
    """
    threads = min(torch.get_num_threads(), items // max(1, least))
    if threads <= 1:
        work(0, items)
        return
    ends = [items * i // threads for i in range(threads + 1)]
    parts = [_pool(threads).submit(work, first, end) for first, end in pairwise(ends)]
    try:
        for part in parts:
            part.result()
    finally:
        wait(parts)  # also where one fails, or somebody interrupts: all work on the caller's memory


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="maskset")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has the pool, but none of its threads
