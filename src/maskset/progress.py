"""How far a long piece of work is, on stderr."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def track(items: Iterable[Item], total: int, what: str, unit: str = "images", note: Callable[[], str] = str) -> Iterator[Item]:
    """Yield the items while a bar on stderr shows how far it is; not on a terminal, a line every half minute and at the end.

    Args:
        items: what is worked on.
        total: how many there should be.
        what: is done with them.
        unit: what they are.
        note: returns what else there is to say so far; nothing by default.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":  # of several processes on a machine, one speaks
        yield from items
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if console.is_terminal:
        with Progress(console=console) as bar:
            task = bar.add_task(what, total=total)
            for item in items:
                yield item
                bar.update(task, advance=1, description=what + note())
        return
    start = told = time.monotonic()
    count = 0
    for count, item in enumerate(items, 1):
        yield item
        if count < total and time.monotonic() - told > 30:
            told = time.monotonic()
            print(f"{what}: {count} of {total} {unit} in {told - start:.0f} s{note()}", file=sys.stderr, flush=True)
    print(f"{what}: {count} of {total} {unit} in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
