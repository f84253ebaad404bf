"""Ctrl-C and SIGTERM while training: not at once, but when a checkpoint can be written."""

import mmap
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_AGAIN = "stopped at once: the same command with --resume continues from the last checkpoint."


class Interruption:
    """Turns the first Ctrl-C or SIGTERM into the flag `requested`; a second Ctrl-C raises KeyboardInterrupt.

    A context: outside of it, and in threads other than the main one, signals do what they did before. Schedulers send SIGTERM to
    a process and to its whole group, so it may come twice, and it also comes to the processes that read images. They ignore it
    until training has ended, since torch would raise the death of one in the middle of a step.
    """

    def __init__(self) -> None:
        self.requested = False
        self._message, self._waits = _AGAIN, True
        self._process, self._ended = os.getpid(), mmap.mmap(-1, 1)  # memory that forked processes share
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        self._ended[0] = 1
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
        if os.getpid() != self._process:  # a process that reads images
            if number == signal.SIGTERM and self._ended[0]:
                raise SystemExit(1)
            return
        again, self.requested = self.requested, True
        if (again and number == signal.SIGINT) or not (again or self._waits):
            raise KeyboardInterrupt(self._message)
