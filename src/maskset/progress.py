"""How far a long piece of work is, on stderr."""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def shown(items: Iterable[Item], total: int, what: str, unit: str = "images") -> Iterator[Item]:
    """Yield the items while a bar on stderr shows how far it is; not on a terminal, a line every half minute and at the end."""
    if os.environ.get("LOCAL_RANK", "0") != "0":  # of several processes on a machine, one speaks
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    if console.is_terminal:
        yield from track(items, description=what, total=total, console=console)
        return
    start = told = time.monotonic()
    count = 0
    for count, item in enumerate(items, 1):
        yield item
        if count < total and time.monotonic() - told > 30:
            told = time.monotonic()
            print(f"{what}: {count} of {total} {unit} in {told - start:.0f} s", file=sys.stderr, flush=True)
    print(f"{what}: {count} of {total} {unit} in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
