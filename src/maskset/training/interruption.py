"""Ctrl-C and SIGTERM while training: not at once, but when a checkpoint can be written."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interruption:
    """Turns the first Ctrl-C (or SIGTERM) into the flag `requested`; a second one raises KeyboardInterrupt.

    A context: outside of it, and in threads other than the main one, signals do what they did before.
    """

    def __init__(self) -> None:
        self.requested = False
        self._at_once = False
        self._process = os.getpid()
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let signals raise KeyboardInterrupt at once inside of this context: nothing there would be lost."""
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def _receive(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:  # a process that reads images: Ctrl-C is meant for the one that trains
            if number == signal.SIGTERM:
                raise SystemExit(1)
        elif self.requested or self._at_once:
            raise KeyboardInterrupt
        else:
            self.requested = True
