"""Names of class channels: COCO's, for 91 raw category ids or the 80 that COCO uses, or those in a text file."""

from pathlib import Path

from maskset.errors import ConversionError
from maskset.instances import Category

NAMES = {
    1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 5: "airplane", 6: "bus", 7: "train", 8: "truck", 9: "boat",
    10: "traffic light", 11: "fire hydrant", 13: "stop sign", 14: "parking meter", 15: "bench", 16: "bird", 17: "cat",
    18: "dog", 19: "horse", 20: "sheep", 21: "cow", 22: "elephant", 23: "bear", 24: "zebra", 25: "giraffe", 27: "backpack",
    28: "umbrella", 31: "handbag", 32: "tie", 33: "suitcase", 34: "frisbee", 35: "skis", 36: "snowboard", 37: "sports ball",
    38: "kite", 39: "baseball bat", 40: "baseball glove", 41: "skateboard", 42: "surfboard", 43: "tennis racket", 44: "bottle",
    46: "wine glass", 47: "cup", 48: "fork", 49: "knife", 50: "spoon", 51: "bowl", 52: "banana", 53: "apple", 54: "sandwich",
    55: "orange", 56: "broccoli", 57: "carrot", 58: "hot dog", 59: "pizza", 60: "donut", 61: "cake", 62: "chair", 63: "couch",
    64: "potted plant", 65: "bed", 67: "dining table", 70: "toilet", 72: "tv", 73: "laptop", 74: "mouse", 75: "remote",
    76: "keyboard", 77: "cell phone", 78: "microwave", 79: "oven", 80: "toaster", 81: "sink", 82: "refrigerator", 84: "book",
    85: "clock", 86: "vase", 87: "scissors", 88: "teddy bear", 89: "hair drier", 90: "toothbrush",
}  # fmt: skip


def raw_categories(channels: int = 91) -> tuple[Category, ...]:
    """Return one category for each raw id from 0 on.

    With COCO's 91 channels they have COCO's names, and ids that COCO does not use are named "unused 12" and so on. With any
    other number the classes are not COCO's: they are named "class 0" and so on.
    """
    if channels != 91:
        return _numbered(channels)
    return tuple(Category(NAMES.get(i, f"unused {i}"), i) for i in range(channels))


def used_categories(channels: int = 80) -> tuple[Category, ...]:
    """Return the 80 categories that COCO uses, in order; with another number of channels "class 0" and so on."""
    if channels != len(NAMES):
        return _numbered(channels)
    return tuple(Category(name, i) for i, name in NAMES.items())


def _numbered(channels: int) -> tuple[Category, ...]:
    return tuple(Category(f"class {i}", i) for i in range(channels))


def read_class_names(file: str | Path, channels: int) -> tuple[Category, ...]:
    """Return one category for each line of a text file; its COCO id is the position of its channel.

    Args:
        file: UTF-8 text with one class name per line, in the order of the channels.
        channels: how many class channels the checkpoint has.

    Raises:
        ConversionError: the file cannot be read, a line is empty, a name occurs twice, or the numbers differ.
    """
    try:
        names = [line.strip() for line in Path(file).read_text(encoding="utf-8-sig").rstrip().split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConversionError(f"the class names in {file} cannot be read: {reason}.") from None
    if len(names) != channels:
        raise ConversionError(
            f"{file} has {len(names)} class names, but the checkpoint has {channels} class channels: write one name per channel, "
            "each on a line of its own. Official SOLQ has a channel for every category id from 0 on, even if no class has it."
        )
    for number, name in enumerate(names, start=1):
        if not name or name in names[: number - 1]:
            raise ConversionError(f"{file}, line {number}: " + (f"{name!r} occurs twice." if name else "the line is empty."))
    return tuple(Category(name, channel) for channel, name in enumerate(names))
