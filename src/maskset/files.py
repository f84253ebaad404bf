"""Atomic writing of files, early checks that they can be written, and locks of folders."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskset.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_FILE = ".lock"  # in a folder while a process writes into it


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and rename it to `path` at the end: a reader never sees half a file.

    Raises:
        OSError: the file cannot be written; the error names `path`.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with name_in_errors(path, part):
            yield part
            with part.open("r+b") as file:  # Windows syncs only files that are open for writing
                os.fsync(file.fileno())
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def name_in_errors(path: Path, part: Path | None = None) -> Iterator[None]:
    """Put `path` into an OSError that has no file name, such as that of a full disk, or has the temporary `part`."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(part)):
            error.filename = str(path)
        raise


@contextmanager
def lock_folder(path: Path) -> Iterator[None]:
    """Create a folder and lock it inside the context; at the end remove it if it is empty and was created here.

    The lock ends with the process, even if that is killed; forked processes do not hold it. If the platform or the file system
    has no locks, the folder is not locked.

    Raises:
        ConfigError: another process holds the lock, `path` is a file, or nothing can be written there.
    """
    check_folder(path)
    made = [folder for folder in (path, *path.absolute().parents) if not folder.exists()]
    descriptor = _lock(path / LOCK_FILE)
    _held.add(descriptor)
    try:
        yield
    finally:
        _unlock(path / LOCK_FILE, descriptor)
        with suppress(OSError):  # not empty, or gone
            for folder in made:
                folder.rmdir()


def _lock(file: Path) -> int:
    """Return the descriptor of the locked file, made with its folder; closing it releases the lock.

    The previous holder may delete the file or its folder at any moment; then try again.
    """
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue
        if fcntl is None:
            return descriptor
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ConfigError(
                f"another process is writing to the folder {file.parent}: wait for it, or choose another folder."
            ) from None
        except OSError:  # some network file systems have no locks
            return descriptor
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                return descriptor
        os.close(descriptor)


def _unlock(file: Path, descriptor: int) -> None:
    """Remove the file and release its lock, in this order where the system can remove open files."""
    with suppress(OSError):
        file.unlink()
    _held.discard(descriptor)
    os.close(descriptor)
    if fcntl is None:
        with suppress(OSError):
            file.unlink()


def _release_in_child() -> None:
    """Close the locks that a forked process inherits: it may live longer than the process that locked."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


_held: set[int] = set()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)


def check_file(path: Path) -> None:
    """Check that a file can be written, before the work that leads to it.

    Raises:
        ConfigError: `path` is a folder, or its folder does not exist or cannot be written to.
    """
    if path.is_dir():
        raise ConfigError(f"{path} cannot be written: it is a folder. Name a file in it.")
    if not path.parent.is_dir():
        raise ConfigError(f"{path} cannot be written: the folder {path.parent} does not exist. Make it first.")
    check_folder(path.parent)


def check_new(path: Path, ending: str) -> None:
    """Check that a new file with this ending can be written.

    Raises:
        ConfigError: `path` exists, has another ending, or cannot be written.
    """
    if path.suffix != ending:
        raise ConfigError(f"{path} must end in {ending}.")
    check_file(path)
    if path.exists():
        raise ConfigError(f"{path} already exists: choose another name, or remove it.")


def check_folder(path: Path) -> None:
    """Check that files can be written into a folder, which need not exist yet.

    Raises:
        ConfigError: `path` or a folder above it is a file, or cannot be written to.
    """
    try:
        nearest = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        if not nearest.is_dir():
            raise ConfigError(f"{nearest} is a file; name a folder.")
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}. Choose another folder.") from None


def write_json(content: Any, path: Path) -> None:
    """Write a JSON file atomically. In file names, bytes that are not UTF-8 are escaped."""
    with atomic_write(path) as part:
        part.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8", errors="backslashreplace")


def write_picture(picture: "Image", path: Path) -> None:
    """Write a PNG file where `path` ends in .png, else a JPEG file, atomically."""
    with atomic_write(path) as part:
        if path.suffix.lower() == ".png":
            picture.save(part, "PNG")
        else:
            picture.save(part, "JPEG", quality=92, subsampling=0)  # thin colored lines would fade with fewer color samples
