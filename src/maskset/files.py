"""Files that are whole or not there: what is written goes beside its place first, and takes it when it is on the disk."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskset.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a file name beside `path` to write to, which takes its place if all goes well: nobody ever sees half a file."""
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def check_file(path: Path) -> None:
    """Raise a ConfigError if a file could not be written, before the work whose result it shall hold.

    Raises:
        ConfigError: `path` is a folder, its folder does not exist, or nothing may be written there.
    """
    if path.is_dir():
        raise ConfigError(f"{path} cannot be written: it is a folder. Name a file in it.")
    if not path.parent.is_dir():
        raise ConfigError(f"{path} cannot be written: the folder {path.parent} does not exist. Make it first.")
    check_folder(path.parent)


def check_new(path: Path, ending: str) -> None:
    """Raise a ConfigError unless a file can be written that is not there yet and has this ending.

    Raises:
        ConfigError: `path` exists, ends otherwise, or could not be written.
    """
    if path.suffix != ending:
        raise ConfigError(f"{path} must end in {ending}.")
    check_file(path)
    if path.exists():
        raise ConfigError(f"{path} already exists: choose another name, or remove it.")


def check_folder(path: Path) -> None:
    """Raise a ConfigError if nothing could be written into a folder, which need not be there yet.

    Raises:
        ConfigError: `path` or one above it is a file, or nothing may be written there.
    """
    try:
        nearest = next(one for one in (path, *path.absolute().parents) if one.exists())
        if not nearest.is_dir():
            raise ConfigError(f"{nearest} is a file, it must be a folder or a new name.")
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}. Choose another folder.") from None


def write_json(content: Any, path: Path) -> None:
    """Write a JSON file, whole or not at all."""
    with atomic_write(path) as part:
        part.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")


def write_picture(picture: "Image", path: Path) -> None:
    """Write a PNG or JPEG file, whole or not at all; the ending chooses which."""
    with atomic_write(path) as part:
        if path.suffix.lower() == ".png":
            picture.save(part, "PNG")
        else:
            picture.save(part, "JPEG", quality=92, subsampling=0)  # thin coloured lines would fade with fewer colour samples
