"""Files are written atomically, and paths are checked before the work."""

import errno
import os
from pathlib import Path

import pytest

from maskset import files
from maskset.errors import ConfigError
from maskset.files import LOCK_FILE, atomic_write, check_file, lock_folder


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail() -> None:
        with atomic_write(path) as part:
            part.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("gone", ["file", "folder"])
def test_a_lock_is_taken_while_its_last_holder_removes_file_and_folder(tmp_path, monkeypatch, gone):
    opened, state, original = [], {"stat": 0}, Path.stat

    def open_once_in_vain(*arguments):
        opened.append(arguments)
        if gone == "folder" and len(opened) == 1:
            os.rmdir(tmp_path / "run")
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(arguments[0]))
        return open_file(*arguments)

    def stat_once_in_vain(path, **options):
        if gone == "file" and path.name == LOCK_FILE and not state["stat"]:
            state["stat"] = 1
            path.unlink()
        return original(path, **options)

    open_file = os.open
    monkeypatch.setattr(files.os, "open", open_once_in_vain)
    monkeypatch.setattr(Path, "stat", stat_once_in_vain)
    with lock_folder(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK_FILE).exists()
    assert len(opened) >= 2


def test_a_full_disk_names_the_file(tmp_path):
    with pytest.raises(OSError, match=r"No space left on device: '.*/a\.json'"), atomic_write(tmp_path / "a.json"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FileNotFoundError) as caught, atomic_write(tmp_path / "missing" / "a.json") as part:
        part.write_text("")
    assert caught.value.filename == str(tmp_path / "missing" / "a.json")


@pytest.mark.parametrize(("name", "message"), [(".", "it is a folder"), ("new/a.json", "new does not exist. Make it first")])
def test_a_file_that_cannot_be_written_is_refused(tmp_path, name, message):
    with pytest.raises(ConfigError, match=message):
        check_file(tmp_path / name)
    check_file(tmp_path / "a.json")


def test_a_lock_file_that_cannot_be_removed_hides_no_error_and_is_released(tmp_path, monkeypatch):
    unlink = Path.unlink

    def refuse(path, **options):
        if path.name == LOCK_FILE:
            raise PermissionError(errno.EACCES, "The file is in use", str(path))  # as on Windows
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(KeyboardInterrupt), lock_folder(tmp_path / "run"):
        raise KeyboardInterrupt
    with lock_folder(tmp_path / "run"):
        pass
