"""Files are written atomically, and paths are checked before the work."""

import errno

import pytest

from maskset.errors import ConfigError
from maskset.files import atomic_write, check_file


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
