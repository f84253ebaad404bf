"""Running a benchmark, printing and writing its results."""

import importlib
import inspect
import os
import time
from pathlib import Path

import torch

from benchmarks import page
from benchmarks.report import Report, save
from maskset.errors import ConfigError
from maskset.kernels.attention import ATTENTION_ENV
from maskset.kernels.library import NATIVE_ENV


def run(name: str, *, quick: bool = False, threads: int = 1, out: Path | None = None, images: int | None = None) -> Report:
    """Run a benchmark, print its results, write them if asked for, and return them.

    Args:
        name: one of `benchmarks.BENCHMARKS`.
        quick: only check that the results agree, on small inputs.
        threads: number of CPU threads.
        out: folder whose `results` get a file and whose README.md is written again.
        images: number of images; for `evaluation` only.

    Raises:
        ConfigError: `threads` or `images` is less than 1, a package is missing, or the content of `out` cannot be replaced.
        benchmarks.report.Disagreement: maskset and the baseline do not compute the same.
    """
    for flag, number in (("--threads", threads), ("--images", images)):
        if number is not None and number < 1:
            raise ConfigError(f"{flag} must be at least 1, got {number}.")
    if quick and out is not None:
        raise ConfigError("the figures of --quick are not worth keeping: leave out --quick or --out.")
    if out is not None:
        page.check(out)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for child processes and other libraries
    torch.set_num_threads(threads)
    module = importlib.import_module(f"benchmarks.{name}")
    start, report = time.monotonic(), Report(name, _about(module.__doc__ or ""), threads)
    module.run(report, quick, **({} if images is None else {"images": images}))
    variables = [f"{variable}={os.environ[variable]}" for variable in (ATTENTION_ENV, NATIVE_ENV) if os.environ.get(variable)]
    command = " ".join(
        [*variables, "python -m benchmarks", name, *_flags(quick, threads, images), *([] if out is None else [f"--out {out}"])]
    )
    result = report.to_dict(command, start)
    heads = ["Small inputs, one round: the results agree; the times mean nothing."] if quick else page.summary([result])
    print("", *heads, *page.section(result), sep="\n\n")
    if out is not None:
        print(f"\nwritten: {', '.join(str(file) for file in [save(result, out / 'results'), page.write(out)])}")
        if hasattr(module, "draw"):
            print(f"written: {module.draw(result, out)}")
    return report


def _about(text: str) -> str:
    return " ".join(inspect.cleandoc(text).split())


def _flags(quick: bool, threads: int, images: int | None) -> list[str]:
    """Return the flags as they are typed."""
    flags = ["--quick"] if quick else []
    if threads != 1:
        flags.append(f"--threads {threads}")
    return flags + ([] if images is None else [f"--images {images}"])
