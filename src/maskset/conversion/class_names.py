"""Class names for a checkpoint that was trained on other classes than COCO's."""

from pathlib import Path

from maskset.errors import ConversionError
from maskset.instances import Category


def read_class_names(file: Path, channels: int) -> tuple[Category, ...]:
    """Return one category for each line of a text file; its COCO id is the position of its channel.

    Args:
        file: UTF-8 text with one class name per line, in the order of the channels.
        channels: how many class channels the checkpoint has.

    Raises:
        ConversionError: the file cannot be read, a line is empty, a name occurs twice, or the numbers differ.
    """
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8-sig").rstrip().split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConversionError(f"the class names in {file} cannot be read: {reason}.") from None
    if len(names) != channels:
        raise ConversionError(
            f"{file} has {len(names)} class names, but the checkpoint has {channels} class channels: write one name per channel, "
            "each in a line. Official SOLQ has a channel for every category id from 0 on, also for ids without a class."
        )
    for number, name in enumerate(names, start=1):
        if not name or name in names[: number - 1]:
            raise ConversionError(f"{file}, line {number}: " + (f"{name!r} occurs twice." if name else "the line is empty."))
    return tuple(Category(name, channel) for channel, name in enumerate(names))
