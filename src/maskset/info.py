"""Versions, devices and fast paths of this machine, for bug reports."""

import os
import platform
from collections.abc import Iterator
from importlib import metadata

import torch

from maskset import __version__
from maskset.kernels import library
from maskset.kernels.attention import ATTENTION_ENV, implementations

_PACKAGES = ("torch", "torchvision", "timm", "numpy", "safetensors", "accelerate", "triton")


def info() -> str:
    """Return a text with versions, devices, and for each fast path whether it works, or why not."""
    facts = [*_versions(), *_devices(), *_fast_paths()]
    width = max(len(name) for name, _ in facts) + 2
    return "\n".join(f"{name:{width}}{value}" for name, value in facts)


def _versions() -> Iterator[tuple[str, str]]:
    yield "maskset", __version__
    yield "Python", f"{platform.python_version()} on {platform.platform()}"
    for name in _PACKAGES:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            yield name, "not installed"


def _devices() -> Iterator[tuple[str, str]]:
    yield "CPU", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    if not torch.cuda.is_available():
        yield "GPU", "none that CUDA can use"


def _fast_paths() -> Iterator[tuple[str, str]]:
    yield "C library", library.unavailable_reason() or "works"
    for name, reason in implementations().items():
        yield f"attention, {name}", reason or "works"
    for variable in (ATTENTION_ENV, library.NATIVE_ENV):
        if os.environ.get(variable):
            yield variable, os.environ[variable]
