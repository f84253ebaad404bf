"""Ctrl-C and SIGTERM while training: not at once, but when a checkpoint can be written."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_AGAIN = "stopped at once: the same command with --resume continues from the last checkpoint."


class Interruption:
    """Turns the first Ctrl-C (or SIGTERM) into the flag `requested`; a second one raises KeyboardInterrupt.

    A context: outside of it, and in threads other than the main one, signals do what they did before.
    """

    def __init__(self) -> None:
        self.requested = False
        self._message, self._waits = _AGAIN, True
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
    def at_once(self, message: str) -> Iterator[None]:
        """Let Ctrl-C raise KeyboardInterrupt with this message inside of the context: nothing there would be lost."""
        self._message, self._waits = message, False
        try:
            if self.requested:
                raise KeyboardInterrupt(message)
            yield
        finally:
            self._message, self._waits = _AGAIN, True

    def _receive(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:  # a process that reads images: Ctrl-C is meant for the one that trains
            if number == signal.SIGTERM:
                raise SystemExit(1)
        elif self.requested or not self._waits:
            raise KeyboardInterrupt(self._message)
        else:
            self.requested = True
