"""The C library. It is built when maskset is installed and a C compiler exists; without it everything works, more slowly.

The library takes pointers and does not depend on Python or torch, so that one build supports every version of both. It cannot
check what it reads, so every Python function that calls it checks its arguments first, with `check` and `check_height_width`.
Each C function processes a range of its items; `parallel_for` distributes the ranges over threads.
"""

import ctypes
import importlib.util
import operator
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from maskset.errors import MasksetError

NATIVE_ENV = "MASKSET_NATIVE"  # environment variable, "on" or "off"; "off" disables the library
SIGNATURES = 0x0B1F8BB2  # of the C functions that this code calls, as in csrc/maskset.h
_REBUILD = "run `pip install --force-reinstall --no-deps .` in the source folder of maskset"
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
NUMBERS = (*FLOATS, torch.int64, torch.int32)


def _load() -> ctypes.CDLL | str:
    """Return the library, or why there is none."""
    spec = importlib.util.find_spec("maskset.kernels._kernels")
    if spec is None or spec.origin is None:
        return f"it was not built because there was no C compiler: install one, then {_REBUILD}"
    try:
        loaded = ctypes.CDLL(spec.origin)
    except OSError as error:
        return f"it cannot be loaded ({error})"
    stamp = getattr(loaded, "maskset_signatures", lambda: None)()
    return loaded if stamp == SIGNATURES else f"it was built from other sources than this version: {_REBUILD}"


_loaded = _load()  # at import: torch.compile cannot trace the loading


def handle() -> ctypes.CDLL | None:
    """Return the C library, or None where it is unavailable or disabled."""
    return None if isinstance(_loaded, str) or _disabled() else _loaded


def unavailable_reason() -> str | None:
    """Return why the library cannot be used; None if it can."""
    if _disabled():
        return f"{NATIVE_ENV}=off disables it"
    return _loaded if isinstance(_loaded, str) else None


def _disabled() -> bool:
    """Return whether the user disabled the library.

    Raises:
        MasksetError: the variable is neither on nor off.
    """
    choice = os.environ.get(NATIVE_ENV) or "on"
    if choice not in ("on", "off"):
        raise MasksetError(f"{NATIVE_ENV} is {choice!r}; allowed are on and off (off disables the C library).")
    return choice == "off"


def supports(device: torch.device) -> bool:
    """Return whether the library can process tensors on a device."""
    return device.type == "cpu" and handle() is not None


def function(name: str) -> Callable[..., int]:
    """Return a function of the library, which must be available, see `handle`.

    The function takes contiguous CPU tensors (passed by address), integers (as ptrdiff_t) and ctypes structures. Every C function
    that is called this way returns ptrdiff_t or nothing.
    """
    loaded = handle()
    assert loaded is not None
    c_function = loaded[name]
    c_function.restype = ctypes.c_ssize_t
    return lambda *arguments: c_function(*map(_to_ctypes, arguments))


def check(name: str, tensor: Any, shape: Sequence[int | None], *dtypes: torch.dtype) -> Tensor:
    """Return the tensor, without gaps, if C can read it as an array of this shape and type.

    Args:
        name: what the error calls it.
        tensor: the argument to check.
        shape: length of each axis; None: any.
        dtypes: allowed types; without any, every floating-point type.

    Raises:
        MasksetError: it is not a tensor on the CPU of this shape and of one of these types.
    """
    if not isinstance(tensor, Tensor):
        raise MasksetError(f"{name} must be a tensor, got {type(tensor).__name__}.")
    fits = tensor.ndim == len(shape) and all(side in (None, got) for side, got in zip(shape, tensor.shape, strict=True))
    if not fits or tensor.dtype not in (dtypes or FLOATS) or tensor.device.type != "cpu" or tensor.layout != torch.strided:
        allowed = "floating point" if not dtypes else " or ".join(_name(dtype) for dtype in dtypes)
        sides = ", ".join("any" if side is None else str(side) for side in shape)
        raise MasksetError(
            f"{name} must be a tensor of shape [{sides}], {allowed}, on the CPU; "
            f"got shape {list(tensor.shape)}, {_name(tensor.dtype)}, on {tensor.device}."
        )
    return tensor.contiguous()


def check_height_width(size: Sequence[int]) -> tuple[int, int]:
    """Return the height and width of an image whose pixels C can number.

    Raises:
        MasksetError: it is not two non-negative integers with a product below 2^31.
    """
    try:
        height, width = map(operator.index, size)
    except (TypeError, ValueError):
        height = width = -1
    if min(height, width) < 0 or height * width >= 2**31 or max(height, width) >= 2**31:
        raise MasksetError(
            f"the image size must be height and width, integers of 0 or more with fewer than 2^31 pixels, got {size}."
        )
    return height, width


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def address(tensor: Tensor) -> int:
    """Return the address of a tensor's data, which the caller must keep alive.

    Raises:
        MasksetError: the tensor is not contiguous, or not on the CPU.
    """
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise MasksetError(f"C reads contiguous tensors on the CPU, got strides {tensor.stride()} on {tensor.device}.")
    return tensor.data_ptr()


def _to_ctypes(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(address(argument))
    return ctypes.c_ssize_t(argument) if isinstance(argument, int) else argument


def parallel_for(work: Callable[[int, int], Any], items: int, min_per_thread: int = 1) -> None:
    """Call `work(first, end)` on consecutive ranges that cover 0 to `items`, one range for each thread that torch may use.

    Args:
        work: calls a function of the library, which releases the interpreter's lock.
        items: number of items.
        min_per_thread: smallest number of items that is worth a thread.
    """
    threads = min(torch.get_num_threads(), items // max(1, min_per_thread))
    if threads <= 1:
        work(0, items)
        return
    ends = [items * i // threads for i in range(threads + 1)]
    futures = [_pool(threads).submit(work, first, end) for first, end in pairwise(ends)]
    try:
        for future in futures:
            future.result()
    finally:
        wait(futures)  # also after an error or Ctrl-C: every thread works on the caller's memory


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="maskset")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # the threads of the pool do not survive a fork
