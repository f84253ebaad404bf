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
    cls.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[attr-defined]  # without it pydantic silently ignores unknown names
    return dataclass(frozen=True, kw_only=True)(cls)


_MAX_INT = 2**31 - 1  # larger numbers overflow in tensors and arrays


@dataclass(frozen=True)
class Bounds:
    """The numbers that a setting may have, for its annotation."""

    minimum: float
    maximum: float = math.inf
    exclude_maximum: bool = False

    def check(self, name: str, number: float) -> None:
        """Raise a ConfigError that names the setting unless the number is within the bounds."""
        if self.minimum <= number <= self.maximum and not (self.exclude_maximum and number == self.maximum):
            return
        if self.maximum < _MAX_INT:
            allowed = f"be in [{self.minimum}, {self.maximum}{')' if self.exclude_maximum else ']'}"
        elif number > self.maximum:
            allowed = f"be at most {self.maximum}"
        else:
            allowed = "not be negative" if self.minimum == 0 else f"be at least {self.minimum}"
        raise ConfigError(f"{name} must {allowed}, got {number}.")


PositiveInt = Annotated[int, Bounds(1, _MAX_INT)]
NonNegativeInt = Annotated[int, Bounds(0, _MAX_INT)]
NonNegativeFloat = Annotated[float, Bounds(0)]
Probability = Annotated[float, Bounds(0, 1)]
Fraction = Annotated[float, Bounds(0, 1, exclude_maximum=True)]  # such as a dropout rate or a momentum, which cannot be 1


def check_bounds(settings: Any, part: str) -> None:
    """Check that every number is finite and within the `Bounds` of its field. Call it in `__post_init__`.

    Args:
        settings: a dataclass.
        part: where the settings are, such as "model", for the message.

    Raises:
        ConfigError: a number is not allowed; the message names the setting.
    """
    bounds = _bounds(type(settings))
    for declared in fields(settings):
        name, value = declared.name, getattr(settings, declared.name)
        numbers: Sequence[Any] = value if isinstance(value, (tuple, list)) else (value,)
        for number in numbers:
            if isinstance(number, float) and not math.isfinite(number):
                raise ConfigError(f"{part}.{name} must be a finite number, got {number}.")
            if name in bounds and not (number is None and declared.default is None):
                bounds[name].check(f"{part}.{name}", number)  # type: ignore[arg-type]  # a required number may be None by mistake


@functools.cache
def _bounds(cls: type) -> dict[str, Bounds]:
    """Return the bounds in the annotations of a class, such as `PositiveInt`, `PositiveInt | None`, `tuple[PositiveInt, ...]`."""
    hints = get_type_hints(cls, include_extras=True)
    kinds = [(name, kind) for name, hint in hints.items() for kind in (hint, *get_args(hint))]
    return {name: note for name, kind in kinds for note in getattr(kind, "__metadata__", ()) if isinstance(note, Bounds)}


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
        ConfigError: the file is not JSON, or its settings are not those of `cls`.
    """
    try:
        values = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON settings: {error}") from None
    return from_dict(cls, values, str(path))


def write(settings: Any, path: Path) -> None:
    """Write the settings as a JSON file, see `read`."""
    path.write_text(json.dumps(to_dict(settings), indent=2) + "\n")


_EXPECTED = {  # in messages, by the first word of pydantic's type of error
    "bool": "true or false",
    "dataclass": "a group of settings",
    "float": "a number",
    "int": "a whole number",
    "string": "text",
    "tuple": "a list",
}


def _explain(cls: type, problem: Any) -> str:
    """Return a sentence about one of pydantic's errors."""
    owner, names = _place(cls, problem["loc"])
    name = ".".join(names) or "the file"
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        near = difflib.get_close_matches(names[-1], _names(owner), n=1, cutoff=0.5)
        return f"there is no setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else ".")
    if problem["type"] == "value_error":  # raised by a check of maskset, whose message is complete
        return str(problem["ctx"]["error"])
    if problem["type"] == "union_tag_invalid":
        got, known = problem["ctx"]["tag"], problem["ctx"]["expected_tags"]
        return f"{name}.system must be one of {known}, got {got!r}: import the module that defines it first, if it is your own."
    if problem["type"] == "union_tag_not_found":
        return f"{name}.system is missing: add the name of the system."
    if problem["type"] in ("missing", "missing_argument"):
        return f"{name} is missing."
    expected = _EXPECTED.get(problem["type"].split("_")[0])
    if problem["type"] == "literal_error":
        expected = problem["ctx"]["expected"]
    return f"{name} must be {expected}, got {problem['input']!r}." if expected else f"{name}: {problem['msg']}."


def _place(cls: Any, location: Sequence[str | int]) -> tuple[Any, list[str]]:
    """Return the class that has the setting at pydantic's location of an error, and the names on the path to it.

    Where a field may be one of several classes, the location contains the `system` of the class, which is left out.
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
