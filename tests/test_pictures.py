"""Images are read from files, folders, patterns, bytes, Pillow, NumPy and PyTorch; anything else is refused."""

import inspect
import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskset.errors import DataError, SourceError
from maskset.pictures import check, expand, expand_files, is_single, read

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RGB).save(folder / name, "PNG")


def test_every_kind_of_picture_gives_the_same_pixels(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "a.png")
    expected = torch.from_numpy(RGB).permute(2, 0, 1)
    with_alpha = np.dstack([RGB, np.full((5, 7), 9, np.uint8)])
    for picture in (
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        Image.fromarray(RGB),
        RGB,
        with_alpha,
        expected,
        RGB[:, ::-1][:, ::-1],
    ):
        assert torch.equal(read(picture), expected)


def test_gray_becomes_three_equal_channels():
    gray = RGB[:, :, 0]
    assert torch.equal(read(gray), torch.from_numpy(gray).expand(3, 5, 7))
    assert torch.equal(read(Image.fromarray(gray)), torch.from_numpy(gray).expand(3, 5, 7))


def test_a_pillow_image_is_turned_as_its_exif_says():
    picture = Image.fromarray(RGB)
    picture.getexif()[0x0112] = 6
    assert read(picture).shape == (3, 7, 5)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (RGB.astype(np.float32), r"must be uint8 \[h w 3\] or \[h w\], got float32 \[5, 7, 3\]"),
        (RGB[:, :, :2], r"got uint8 \[5, 7, 2\]"),
        (RGB[:0], r"got uint8 \[0, 7, 3\]"),
        (torch.zeros(5, 7, 3, dtype=torch.uint8), r"must be uint8 \[3 h w\], got torch.uint8 \[5, 7, 3\]"),
        (torch.zeros(3, 5, 7), "got torch.float32"),
        (Image.fromarray(RGB[:, :, 0].astype(np.uint16)), "mode I;16 has no fixed range"),
        (np.stack([RGB, RGB]), r"got uint8 \[2, 5, 7, 3\].*several images are a list"),
        (None, "NoneType is not an image. An image is a file name, bytes, "),
        (5, "int is not an image"),
        ([RGB], "list is not an image"),
        (io.StringIO("text"), r"must be opened as open\(name, 'rb'\)"),
        (b"", "the bytes of the image are empty"),
        ("", "the file name is empty"),
    ],
)
def test_a_source_that_is_not_an_image_is_refused_with_what_is_accepted(picture, message):
    for function in (check, inspect.unwrap(read)):  # without the type checker of the tests
        with pytest.raises(SourceError, match=message):
            function(picture)


def test_a_data_set_is_not_taken_for_an_open_file():
    class Dataset:
        def read(self, index):
            raise AssertionError

    with pytest.raises(SourceError, match="Dataset is not an image"):
        check(Dataset())


def test_bytes_and_open_files_are_read_like_the_file(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "a.png")
    expected, data = read(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()
    with open(tmp_path / "a.png", "rb") as file:
        assert torch.equal(read(file), expected)
    assert torch.equal(read(data), expected)
    assert torch.equal(read(io.BytesIO(data)), expected)
    with pytest.raises(DataError, match="the file in memory cannot be read as an image"):
        read(data[:20])


def test_a_closed_file_is_said_to_be_closed():
    file = io.BytesIO(b"x")
    file.close()
    with pytest.raises(SourceError, match="the file is closed"):
        check(file)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(SourceError, match=r"pipe\.png is not a regular file"):
        expand(tmp_path / "pipe.png")
    with pytest.raises(DataError, match=r"pipe\.png cannot be read as an image: it is not a regular file"):
        read(tmp_path / "pipe.png")


def test_postscript_under_another_name_starts_no_interpreter(tmp_path, monkeypatch):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript would run"))
    Image.fromarray(RGB).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(DataError, match="EPS files contain programs"):
        read(tmp_path / "a.png")


def test_a_file_that_is_no_image_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match=r"notes\.txt"):
        read(tmp_path / "notes.txt")


def test_a_folder_gives_its_images_by_name_and_nothing_else(tmp_path):
    touch(tmp_path, "b.png", "a.JPG", "inside/c.png", ".hidden.png")
    (tmp_path / "notes.txt").write_text("hello")
    assert expand_files([tmp_path]) == [tmp_path / "a.JPG", tmp_path / "b.png"]


def test_a_pattern_can_reach_into_folders(tmp_path):
    touch(tmp_path, "b.png", "inside/c.png", "inside/deeper/d.jpg")
    assert expand_files([f"{tmp_path}/**/*.png"]) == [tmp_path / "b.png", tmp_path / "inside/c.png"]


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(tmp_path):
    touch(tmp_path, "[1].png", "1.png")
    assert expand_files([tmp_path / "[1].png"]) == [tmp_path / "[1].png"]
    assert is_single(tmp_path / "[1].png")


def test_sources_keep_their_order(tmp_path):
    touch(tmp_path, "z.png", "more/a.png", "more/b.png")
    assert [file.name for file in expand_files([tmp_path / "z.png", tmp_path / "more"])] == ["z.png", "a.png", "b.png"]


def test_one_file_name_is_a_source_and_an_empty_one_is_not(tmp_path):
    touch(tmp_path, "a.png")
    assert expand_files(str(tmp_path / "a.png")) == [tmp_path / "a.png"]
    with pytest.raises(SourceError, match="the name of an image file, a folder or a pattern is needed, got ''"):
        expand_files([""])


def test_one_picture_is_told_from_several(tmp_path):
    touch(tmp_path, "a.png")
    assert all(map(is_single, (RGB, torch.zeros(3, 5, 7), Image.fromarray(RGB), tmp_path / "a.png", str(tmp_path / "a.png"))))
    assert not any(map(is_single, ([RGB], [], tmp_path, str(tmp_path), f"{tmp_path}/*.png")))


def test_a_list_may_mix_files_folders_and_pictures(tmp_path):
    touch(tmp_path, "a.png", "b.png")
    first, *rest = expand([RGB, tmp_path])
    assert first is RGB
    assert rest == [tmp_path / "a.png", tmp_path / "b.png"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.png", r"there is no file or folder .*missing\.png"),
        ("*.png", r"no image among the 0 matches of .*\*\.png"),
        ("*", r"no image among the 1 matches of .*\*; .*\.jpg"),
        ("empty", r"no image in the folder .*empty"),
    ],
)
def test_where_there_is_no_image_it_says_what_was_looked_for(tmp_path, source, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=message):
        expand_files([tmp_path / source])
