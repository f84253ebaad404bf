"""Settings as flags of a command: `--train.epochs 3`, with the values at hand as defaults and the fields' comments as help."""

import inspect
import re
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar, get_args, get_type_hints

from maskset.config import from_dict, to_dict

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Setting:
    """One number, text or list of the settings.

    Attributes:
        name: with dots, such as `train.epochs`.
        value: what it is now.
        meaning: the comment beside the field, which gives the unit.
        optional: whether it may be None.
    """

    name: str
    value: Any
    meaning: str
    optional: bool

    @property
    def flag(self) -> str:
        """The flag that changes it."""
        return "--" + self.name.replace("_", "-")

    @property
    def text(self) -> str:
        """The value as one would type it."""
        if isinstance(self.value, (tuple, list)):
            return " ".join(str(one) for one in self.value)
        return str(self.value).lower() if self.value is None or isinstance(self.value, bool) else str(self.value)


def listed(settings: Any, prefix: str = "") -> Iterator[Setting]:
    """Yield every setting, in the order of the fields, those of nested settings in their place."""
    hints, meanings = get_type_hints(type(settings)), _comments(type(settings))
    for field in fields(settings):
        name, value = prefix + field.name, getattr(settings, field.name)
        if is_dataclass(value):
            yield from listed(value, f"{name}.")
        else:
            yield Setting(name, value, meanings.get(field.name, ""), type(None) in get_args(hints[field.name]))


def add(parser: ArgumentParser, settings: Any) -> None:
    """Give the parser one flag for each setting, in a group for each part of the settings."""
    groups = {}
    for setting in listed(settings):
        part = setting.name.split(".")[0]
        group = groups.setdefault(part, parser.add_argument_group(f"{part} settings") if part not in groups else None)
        group.add_argument(
            setting.flag,
            dest=setting.name,
            metavar="VALUE",
            nargs="*" if isinstance(setting.value, tuple) else None,
            help=f"{setting.meaning} (default: {setting.text or 'nothing'})".replace("%", "%%"),
        )


def changed(settings: Settings, given: Mapping[str, Any]) -> Settings:
    """Return the settings with what was given on the command line.

    Args:
        settings: what `add` made flags of.
        given: the text or texts of each flag by the setting's name; None where the flag was not given.

    Raises:
        maskset.errors.ConfigError: a value is not allowed.
    """
    values = to_dict(settings)
    for setting in listed(settings):
        text = given.get(setting.name)
        if text is not None:
            *parts, last = setting.name.split(".")
            target = values
            for part in parts:
                target = target[part]
            target[last] = None if setting.optional and text == "none" else text
    return from_dict(type(settings), values, "command line")


def table(settings: Any) -> str:
    """Return one line for each setting: its flag, its value and its meaning."""
    rows = list(listed(settings))
    flag_width, value_width = (
        min(32, max(map(len, column))) for column in ([row.flag for row in rows], [row.text for row in rows])
    )
    return "\n".join(f"{row.flag:{flag_width}}  {row.text:{value_width}}  {row.meaning}" for row in rows)


def _comments(cls: type) -> dict[str, str]:
    """Return the comment at the end of each field's line, which is where a field's meaning is written."""
    return dict(re.findall(r"^    (\w+):.*?  # (.*)$", inspect.getsource(cls), flags=re.MULTILINE))
