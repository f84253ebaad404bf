"""The command line: finds the command that is meant, and says in one line what is wrong. The commands are in `commands`."""

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from maskset import __version__
from maskset.commands import COMMANDS, Command
from maskset.errors import MasksetError

BAD_INPUT, INTERRUPTED = 2, 130  # exit codes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 2 bad input, 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    try:
        _run([argument for argument in given if argument != "--debug"])
        sys.stdout.flush()
    except KeyboardInterrupt as interrupt:  # training says how to go on
        print(f"maskset: interrupted. {interrupt}".rstrip(), file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        if debug:
            raise
        print(f"maskset: error: {_in_one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    return 0


def parse(arguments: Sequence[str]) -> tuple[Command, argparse.Namespace]:
    """Return the command that the arguments name, and what they give it.

    Raises:
        ValueError: there is no such command or flag, something is missing, or a value is not allowed.
    """
    words = 2 if " ".join(arguments[:2]) in COMMANDS else 1
    name, rest = " ".join(arguments[:words]), arguments[words:]
    if _group(name):
        if rest and not rest[0].startswith("-"):
            near = _nearest(rest[0], [command.split()[1] for command in _group(name)])
            raise MasksetError(f"there is no command {name} {rest[0]}{near} (`maskset {name} --help` lists them).")
        raise MasksetError(f"{name} is several commands: {', '.join(_group(name))} (`maskset {name} --help` explains them).")
    if name not in COMMANDS:
        known = [*COMMANDS, *(command.split()[0] for command in COMMANDS)]
        raise MasksetError(f"there is no command {name}{_nearest(name, known)} (`maskset --help` lists them).")
    command = COMMANDS[name]
    parser = _Parser(prog=f"maskset {name}", description=command.help, allow_abbrev=False)
    command.flags(parser, rest)
    return command, parser.parse(rest)


def _run(arguments: Sequence[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
    elif _group(arguments[0]) and arguments[1:] in (["-h"], ["--help"]):
        print(_overview(_group(arguments[0])))
    elif arguments[0] == "--version":
        print(f"maskset {__version__}")
    else:
        command, given = parse(arguments)
        command.call(given)


def _group(name: str) -> list[str]:
    """Return the commands of two words that begin with this one."""
    return [known for known in COMMANDS if known.startswith(f"{name} ")]


class _Parser(argparse.ArgumentParser):
    """argparse whose mistakes are ValueErrors, and which names the flag that was meant."""

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Return the values of the flags. An unknown flag is told before a missing one: it may be the same, mistyped."""
        known = self._option_string_actions
        for argument in arguments:
            flag = argument.split("=")[0]
            if flag.startswith("--") and flag != "--" and flag not in known:
                self.error(f"there is no flag {flag}{_nearest(flag, known)}")
        return self.parse_args(arguments)

    def error(self, message: str) -> NoReturn:
        raise MasksetError(f"{message} (`{self.prog} --help` lists what it takes).")


def _nearest(name: str, known: Sequence[str] | dict) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _in_one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split())


def _overview(names: Sequence[str] = ()) -> str:
    names = names or list(COMMANDS)
    width = max(map(len, names)) + 2
    lines = [f"  {name:{width}}{COMMANDS[name].help.splitlines()[0]}" for name in names]
    return "\n".join(
        [
            "usage: maskset COMMAND ... [--debug]",
            "",
            "End-to-end instance segmentation with transformers: an image in, a set of masks out.",
            "",
            *lines,
            "",
            "`maskset COMMAND --help` explains one; --debug shows where an error came from. New here? `maskset demo`.",
        ]
    )
