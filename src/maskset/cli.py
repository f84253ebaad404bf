"""The command line: selects a command, runs it and reports errors. The commands themselves are in `commands`.

Exit codes: 0 success, 1 a bug in maskset, 2 invalid input, 130 interrupted by Ctrl-C, 143 terminated by SIGTERM.
"""

import argparse
import difflib
import io
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from maskset import __version__
from maskset.commands import COMMANDS, GROUPS, Command
from maskset.errors import MasksetError, Terminated

BUG, INVALID, INTERRUPTED, TERMINATED = 1, 2, 130, 143  # exit codes
ISSUES = "https://github.com/maskset/maskset/issues"
_OUT_OF_MEMORY = re.compile("can't allocate memory|out of memory|Storage size calculation overflowed", re.IGNORECASE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in _before_separator(arguments)
    if debug:
        arguments.remove("--debug")
    with _standard_streams(), _termination():
        try:
            try:
                _run(arguments)
            finally:
                sys.stdout.flush()
        except KeyboardInterrupt as interrupt:  # its message says how to resume
            terminated = isinstance(interrupt, Terminated)
            print(f"maskset: {'terminated' if terminated else 'interrupted'}. {interrupt}".rstrip(), file=sys.stderr)
            return TERMINATED if terminated else INTERRUPTED
        except Exception as error:
            message = _user_message(error, arguments)
            if debug or message is None:
                traceback.print_exc()
            if message is None:
                print(f"maskset: this is a bug. Please report it, with the lines above: {ISSUES}", file=sys.stderr)
                return BUG
            print(f"maskset: error: {message}", file=sys.stderr)
            return INVALID
    return 0


def parse(arguments: Sequence[str]) -> tuple[Command, argparse.Namespace]:
    """Return the command that the arguments name, and its options.

    Raises:
        MasksetError: the command or a flag does not exist, an argument is missing, or a value is not allowed.
    """
    name = _command_name(arguments)
    rest = arguments[len(name.split()) :]
    if _subcommands(name):
        if rest and not rest[0].startswith("-"):
            near = _nearest(rest[0], [command.split()[1] for command in _subcommands(name)], f"{name} ")
            raise MasksetError(f"there is no command {name} {rest[0]}{near} (`maskset {name} --help` lists them).")
        raise MasksetError(
            f"{name} has several commands: {', '.join(_subcommands(name))} (`maskset {name} --help` explains them)."
        )
    if name not in COMMANDS:
        known = [*COMMANDS, *(command.split()[0] for command in COMMANDS)]
        raise MasksetError(f"there is no command {name}{_nearest(name, known)} (`maskset --help` lists them).")
    command = COMMANDS[name]
    parser = _Parser(f"maskset {name}", command.help)
    command.add_flags(parser, rest)
    return command, parser.parse(rest)


def _run(arguments: Sequence[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
    elif _subcommands(arguments[0]) and arguments[1:] in (["-h"], ["--help"]):
        print("\n".join(_listing(_subcommands(arguments[0]))))
    elif arguments[0] == "--version":
        print(f"maskset {__version__}")
    else:
        command, options = parse(arguments)
        command.call(options)


def _command_name(arguments: Sequence[str]) -> str:
    """Return the first two words if they name a command, else the first one."""
    return " ".join(arguments[: 2 if " ".join(arguments[:2]) in COMMANDS else 1])


def _subcommands(name: str) -> list[str]:
    """Return the commands of two words that begin with `name`."""
    return [command for command in COMMANDS if command.startswith(f"{name} ")]


class _Parser(argparse.ArgumentParser):
    """An argparse parser that raises MasksetError and suggests the nearest flag."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False, add_help=False)
        self.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Return the options. Unknown flags are reported before missing ones, because one may be the other, mistyped."""
        known = self._option_string_actions  # not public: see tests/evaluation/test_private_apis.py
        for argument in _before_separator(arguments):
            flag, equals, value = argument.partition("=")
            if not flag or (equals and not value and flag in known):
                self.error(f"the value of {flag or 'an argument'} is empty: is a shell variable unset?")
            if re.match("--.|-[^-0-9.]", flag) and flag not in known:
                path = f"; a file of this name is written ./{argument}" if os.path.exists(argument) else ""
                self.error(f"there is no flag {flag}{path or _nearest(flag, known)}")
        return self.parse_args(arguments)

    def error(self, message: str) -> NoReturn:
        raise MasksetError(f"{message} (`{self.prog} --help` lists the flags).")


def _before_separator(arguments: Sequence[str]) -> Sequence[str]:
    """Return the arguments before `--`, behind which nothing is a flag."""
    return arguments[: arguments.index("--")] if "--" in arguments else arguments


def _nearest(name: str, known: Collection[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def _user_message(error: Exception, arguments: Sequence[str]) -> str | None:
    """Return one line about an error that the user can correct; None if the error is a bug."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(text)):
        command = COMMANDS.get(_command_name(arguments))
        return f"out of memory. {command.memory_advice if command else ''}".rstrip()
    if isinstance(error, MasksetError):
        return text
    if isinstance(error, OSError):
        if error.strerror and error.filename:
            return f"{error.strerror}: {error.filename}"
        return error.strerror or text or type(error).__name__
    return None


def _listing(names: Sequence[str]) -> list[str]:
    width = max(map(len, COMMANDS)) + 2
    return [f"  {name:{width}}{COMMANDS[name].help.splitlines()[0]}" for name in names]


def _overview() -> str:
    lines = ["usage: maskset COMMAND ... [--debug]", "", "End-to-end instance segmentation with transformers."]
    for group in GROUPS:
        lines += ["", group, *_listing([name for name, command in COMMANDS.items() if command.group == group])]
    return "\n".join([*lines, "", "`maskset COMMAND --help` lists its options. New here? Try `maskset demo`."])


@contextmanager
def _termination() -> Iterator[None]:
    """Raise Terminated on SIGTERM inside the context, so that files are closed and temporary ones removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process = os.getpid()

    def receive(number: int, _: FrameType | None) -> None:
        if os.getpid() == process:
            raise Terminated
        signal.signal(number, signal.SIG_DFL)  # a child process ends at once
        os.kill(os.getpid(), number)

    previous = signal.signal(signal.SIGTERM, receive)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def _standard_streams() -> Iterator[None]:
    """Replace the standard streams inside the context by streams that survive a closed pipe, as of `| head`.

    A command then continues without output, so that its work is not lost. A closed stream is replaced by one that discards all
    output. A stream that was replaced before, by a test or a notebook, is not touched.
    """
    streams = sys.stdout, sys.stderr
    sys.stdout = _robust(sys.stdout, sys.__stdout__, "standard output")
    sys.stderr = _robust(sys.stderr, sys.__stderr__, "")
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams


def _robust(stream, original, name: str):
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    if stream is not original:
        return stream
    stream.flush()
    raw = io.BufferedWriter(_RobustFile(stream.fileno(), name))
    return io.TextIOWrapper(raw, stream.encoding, "backslashreplace", line_buffering=stream.line_buffering or not name)


class _RobustFile(io.FileIO):
    """A standard stream that discards everything after its first failed write."""

    def __init__(self, descriptor: int, name: str) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._name = name  # empty for standard error: there is no other stream to report its errors on

    def write(self, data) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            if self._name and not isinstance(error, BrokenPipeError):
                raise OSError(error.errno, error.strerror, self._name) from None
            return len(data)
