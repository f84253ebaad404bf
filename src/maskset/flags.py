"""Settings as command-line flags: `--train.epochs 3`, with the recipe's values as defaults."""

from argparse import SUPPRESS, ArgumentParser
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar, get_args, get_type_hints

from maskset.config import from_dict, to_dict

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        name: dotted, such as `train.epochs`.
        value: current value.
        help: description, with the unit.
        optional: whether it may be None.
    """

    name: str
    value: Any
    help: str
    optional: bool

    @property
    def flag(self) -> str:
        """The flag of the setting."""
        return "--" + self.name.replace("_", "-")

    @property
    def text(self) -> str:
        """The value as it is typed on the command line."""
        if isinstance(self.value, (tuple, list)):
            return " ".join(map(str, self.value)) or "none"
        return str(self.value).lower() if self.value is None or isinstance(self.value, bool) else str(self.value)


def flatten(settings: Any, prefix: str = "") -> Iterator[Setting]:
    """Yield every setting in the order of the fields, nested settings in place of their group."""
    hints = get_type_hints(type(settings))
    for field in fields(settings):
        name, value = prefix + field.name, getattr(settings, field.name)
        if is_dataclass(value):
            yield from flatten(value, f"{name}.")
        else:
            yield Setting(name, value, field.metadata.get("description", ""), type(None) in get_args(hints[field.name]))


def add(parser: ArgumentParser, settings: Any, visible: Container[str] | None = None) -> None:
    """Add one flag for each setting to the parser, in one group for each part of the settings.

    Args:
        parser: gets the flags.
        settings: a dataclass, whose values are the defaults.
        visible: names of the settings to list in the help; by default all.
    """
    groups = {}
    for setting in flatten(settings):
        part = setting.name.split(".")[0]
        if part not in groups:
            groups[part] = parser.add_argument_group(f"{part} settings")
        help = f"{setting.help} (default: {setting.text})".replace("%", "%%")
        groups[part].add_argument(
            setting.flag,
            dest=setting.name,
            metavar="VALUE",
            nargs="*" if isinstance(setting.value, tuple) else None,
            help=help if visible is None or setting.name in visible else SUPPRESS,
        )


def apply(settings: Settings, options: Mapping[str, Any]) -> Settings:
    """Return the settings with the values of the command line.

    Args:
        settings: the settings whose flags `add` added.
        options: text, or list of texts, of each flag by the setting's name; None for flags that are absent.

    Raises:
        maskset.errors.ConfigError: a value is not allowed.
    """
    values = to_dict(settings)
    for setting in flatten(settings):
        text = options.get(setting.name)
        if text is not None:
            *parts, last = setting.name.split(".")
            target = values
            for part in parts:
                target = target[part]
            target[last] = [] if text == ["none"] else None if setting.optional and text == "none" else text
    return from_dict(type(settings), values, "command line")


def table(settings: Any) -> str:
    """Return one line for each setting: flag, value, help."""
    rows = list(flatten(settings))
    flag_width, value_width = (
        min(32, max(map(len, column))) for column in ([row.flag for row in rows], [row.text for row in rows])
    )
    return "\n".join(f"{row.flag:{flag_width}}  {row.text:{value_width}}  {row.help}" for row in rows)
