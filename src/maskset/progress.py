"""Progress on stderr."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def report(message: str, *details: str) -> None:
    """Print a message to stderr, with one indented line for each detail."""
    print(message, *(f"  {detail}" for detail in details), sep="\n", file=sys.stderr, flush=True)


def track(
    items: Iterable[Item], total: int, description: str, unit: str = "images", note: Callable[[], str] = str
) -> Iterator[Item]:
    """Yield the items and show progress on stderr: a bar on a terminal, else a line every 30 seconds and at the end.

    Of several processes on a machine, only the first shows it.

    Args:
        items: the items to process.
        total: number of items.
        description: description of the work, such as "predicting".
        unit: what is counted, in the plural.
        note: returns text to append to the description.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        yield from items
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if console.is_terminal:
        with Progress(console=console) as bar:
            task = bar.add_task(description, total=total)
            for item in items:
                yield item
                bar.update(task, advance=1, description=description + note())
        return
    start = last_report = time.monotonic()
    count = 0
    for count, item in enumerate(items, 1):
        yield item
        if count < total and time.monotonic() - last_report > 30:
            last_report = time.monotonic()
            report(f"{description}: {count} of {total} {unit} in {last_report - start:.0f} s{note()}")
    report(f"{description}: {count} of {total} {unit} in {time.monotonic() - start:.0f} s")
