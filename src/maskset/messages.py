"""Parts of messages to the user."""

from collections.abc import Sequence


def pluralize(number: int, noun: str) -> str:
    """Return number and noun, such as "1 step", "2 steps" or "2 classes"."""
    return f"{number} {noun}" + ("" if number == 1 else "es" if noun.endswith("s") else "s")


def first_names(names: Sequence[str], most: int = 8) -> str:
    """Return the first names and the number of the others, such as "a, b and 3 more"; "none" if there are no names."""
    return (", ".join(names[:most]) or "none") + (f" and {len(names) - most} more" if len(names) > most else "")
