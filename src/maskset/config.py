"""Settings are frozen dataclasses. Here: the decorator that makes one, and reading and writing them as JSON."""

import difflib
import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, dataclass_transform, get_args, get_type_hints

from maskset.errors import ConfigError

Settings = TypeVar("Settings")
Value = TypeVar("Value")


def setting(default: Value, help: str) -> Value:
    """Return a field of a settings class. The help is shown by `maskset train --help-all` and `maskset show`."""
    return field(default=default, metadata={"description": help})  # type: ignore[return-value]  # to type checkers a plain default


@dataclass_transform(kw_only_default=True, frozen_default=True)
def config(cls: type[Settings]) -> type[Settings]:
    """Return the class as a frozen, keyword-only dataclass that refuses unknown settings when read from a file."""
    cls.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[attr-defined]  # without it pydantic drops typos in silence
    return dataclass(frozen=True, kw_only=True)(cls)


@dataclass(frozen=True)
class Bounds:
    """What numbers a setting may have, in its annotation: at least `least`, at most (or only below) `most`."""

    least: float
    most: float = math.inf
    below: bool = False

    def allow(self, number: float) -> bool:
        """Return whether the number is allowed."""
        return self.least <= number <= self.most and not (self.below and number == self.most)

    def __str__(self) -> str:
        if self.most < math.inf:
            return f"be in [{self.least}, {self.most}" + (")" if self.below else "]")
        return "not be negative" if self.least == 0 else f"be at least {self.least}"


PositiveInt = Annotated[int, Bounds(1)]
NonNegativeInt = Annotated[int, Bounds(0)]
NonNegativeFloat = Annotated[float, Bounds(0)]
Probability = Annotated[float, Bounds(0, 1)]
Fraction = Annotated[float, Bounds(0, 1, below=True)]  # such as a dropout rate or a momentum, for which 1 makes no sense


def check_bounds(settings: Any, part: str) -> None:
    """Check that every number is finite and within the `Bounds` of its field. Call it in `__post_init__`.

    Args:
        settings: a dataclass.
        part: where the settings are, such as "model", for the message.

    Raises:
        ConfigError: a number is not allowed; the message names the setting.
    """
    bounds = _bounds(type(settings))
    for name, value in vars(settings).items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise ConfigError(f"{part}.{name} must be a finite number, got {number}.")
            if name in bounds and not bounds[name].allow(number):
                raise ConfigError(f"{part}.{name} must {bounds[name]}, got {number}.")


@functools.cache
def _bounds(cls: type) -> dict[str, Bounds]:
    notes = {name: getattr(hint, "__metadata__", ()) for name, hint in get_type_hints(cls, include_extras=True).items()}
    return {name: note for name, each in notes.items() for note in each if isinstance(note, Bounds)}


def check_between(settings: Any, part: str, name: str, least: float, most: float) -> None:
    """Check that a setting is in [least, most], where that depends on other settings. See `check_bounds`.

    Raises:
        ConfigError: it is not.
    """
    if not Bounds(least, most).allow(getattr(settings, name)):
        raise ConfigError(f"{part}.{name} must {Bounds(least, most)}, got {getattr(settings, name)}.")


def subclasses(cls: type) -> list[type]:
    """Return all classes that inherit from a class, directly or not, in the order of their definition."""
    return [subclass for child in cls.__subclasses__() for subclass in (child, *subclasses(child))]


def to_dict(settings: Any) -> dict[str, Any]:
    """Return the settings as plain dicts, lists, numbers and text."""
    from pydantic import TypeAdapter

    return TypeAdapter(type(settings)).dump_python(settings, mode="json")


def from_dict(cls: type[Settings], values: dict[str, Any], where: str) -> Settings:
    """Return settings of class `cls`.

    Args:
        cls: a class made by `config`.
        values: what `to_dict` gives.
        where: what the values come from, for messages.

    Raises:
        ConfigError: a setting is unknown (the message names the nearest), or a value is not allowed.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        raise ConfigError(f"{where}: " + "; ".join(_explain(cls, problem) for problem in error.errors())) from None


def read(cls: type[Settings], path: Path) -> Settings:
    """Return the settings in a JSON file.

    Raises:
        ConfigError: the file is no JSON, or its settings are not those of `cls`.
    """
    try:
        values = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON settings: {error}") from None
    return from_dict(cls, values, str(path))


def write(settings: Any, path: Path) -> None:
    """Write the settings as a JSON file that `read` takes."""
    path.write_text(json.dumps(to_dict(settings), indent=2) + "\n")


def _explain(cls: type, problem: Any) -> str:
    owner, names = _place(cls, problem["loc"])
    name = ".".join(names) or "the file"
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        near = difflib.get_close_matches(names[-1], _names(owner), n=1, cutoff=0.5)
        return f"there is no setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else ".")
    if problem["type"] == "value_error":  # raised by a check of ours, whose message says it all
        return str(problem["ctx"]["error"])
    if problem["type"] == "union_tag_invalid":
        got, known = problem["ctx"]["tag"], problem["ctx"]["expected_tags"]
        return f"{name}.system must be one of {known}, got {got!r}: import the module that defines it first, if it is your own."
    if problem["type"] == "union_tag_not_found":
        return f"{name}.system is missing: it says which system the settings are of."
    got = "" if problem["type"] in ("missing", "missing_argument") else f", got {problem.get('input')!r}"
    return f"{name}: {problem['msg']}{got}"


def _place(cls: Any, location: Sequence[str | int]) -> tuple[Any, list[str]]:
    """Return the class that has the setting which pydantic tells the location of, and the names on the way to it.

    Of several classes that a setting may have, pydantic tells the one it took by its `system`, which is no name on the way.
    """
    owner, kind, names = cls, cls, []
    for part in location:
        if isinstance(kind, type) and (tagged := [child for child in subclasses(kind) if vars(child).get("system") == part]):
            kind = tagged[-1]
            continue
        names.append(str(part))
        owner, kind = kind, get_type_hints(kind).get(str(part)) if is_dataclass(kind) else None
    return owner, names


def _names(cls: Any, prefix: str = "") -> list[str]:
    """Return the names of all settings of a class and, with dots, of the classes inside it."""
    if not is_dataclass(cls):
        return [name for part in get_args(cls) for name in _names(part, prefix)]
    hints = get_type_hints(cls)
    return [name for field in fields(cls) for name in (prefix + field.name, *_names(hints[field.name], f"{prefix}{field.name}."))]
