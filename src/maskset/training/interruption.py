"""Ctrl-C and SIGTERM during training: the run ends at the next moment at which a checkpoint can be written."""

import mmap
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from maskset.errors import Terminated

_STOPPED_MESSAGE = "stopped at once: the same command with --resume continues from the last checkpoint."


class Interruption:
    """A context in which the first Ctrl-C or SIGTERM only sets `requested`, and a second Ctrl-C raises KeyboardInterrupt.

    Outside of the context, and in threads other than the main one, signals have their usual effect. Schedulers send SIGTERM to
    a process and to its whole group, so it may arrive twice, and the processes that read images get it too. Those ignore it
    until training has ended, because torch would raise an error in the middle of a step when one of them exits.

    Attributes:
        requested: whether a signal was received.
        error: the exception to raise after the checkpoint: KeyboardInterrupt, or Terminated after SIGTERM.
    """

    def __init__(self) -> None:
        self.requested = False
        self.error: type[KeyboardInterrupt] = KeyboardInterrupt
        self._message, self._defers = _STOPPED_MESSAGE, True
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
    def raise_immediately(self, message: str) -> Iterator[None]:
        """Let signals raise an exception with this message inside of the context, where nothing would be lost."""
        self._message, self._defers = message, False
        try:
            if self.requested:
                raise self.error(message)
            yield
        finally:
            self._message, self._defers = _STOPPED_MESSAGE, True

    def _receive(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:  # a process that reads images
            if number == signal.SIGTERM and self._ended[0]:
                raise SystemExit(1)
            return
        again, self.requested = self.requested, True
        self.error = Terminated if number == signal.SIGTERM else KeyboardInterrupt
        if (again and number == signal.SIGINT) or not (again or self._defers):
            raise self.error(self._message)
