"""Files are whole or not there, and what cannot be written is told first."""

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


@pytest.mark.parametrize(("name", "message"), [(".", "it is a folder"), ("new/a.json", "new does not exist. Make it first")])
def test_what_cannot_be_written_is_told_before_the_work(tmp_path, name, message):
    with pytest.raises(ConfigError, match=message):
        check_file(tmp_path / name)
    check_file(tmp_path / "a.json")
