"""Every kind of image file becomes RGB pixels, the right way up, or an error that names the file."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from maskset.errors import DataError
from maskset.pictures import read_image

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def saved(folder: Path, picture: Image.Image, name: str = "a.png", **options) -> Path:
    picture.save(folder / name, **options)
    return folder / name


def read(file: Path) -> np.ndarray:
    return read_image(file).permute(1, 2, 0).numpy()


def test_rgb_is_read_as_it_is(tmp_path: Path) -> None:
    pixels = read_image(saved(tmp_path, Image.fromarray(RGB)))
    assert pixels.dtype == torch.uint8
    np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), RGB)


def test_gray_is_repeated(tmp_path: Path) -> None:
    pixels = read(saved(tmp_path, Image.fromarray(RGB[..., 0])))
    np.testing.assert_array_equal(pixels, RGB[..., :1].repeat(3, 2))


def test_black_and_white_becomes_0_and_255(tmp_path: Path) -> None:
    pixels = read(saved(tmp_path, Image.fromarray(RGB[..., 0] > 100)))
    np.testing.assert_array_equal(pixels[..., 0], 255 * (RGB[..., 0] > 100))


def test_transparency_is_ignored(tmp_path: Path) -> None:
    clear = np.concatenate([RGB, RGB[..., :1]], 2)
    np.testing.assert_array_equal(read(saved(tmp_path, Image.fromarray(clear))), RGB)


def test_a_palette_is_looked_up(tmp_path: Path) -> None:
    picture = Image.fromarray(RGB[..., 0] // 64).convert("P")
    picture.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    expected = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90], [100, 110, 120]])[RGB[..., 0] // 64]
    np.testing.assert_array_equal(read(saved(tmp_path, picture)), expected)
    np.testing.assert_array_equal(read(saved(tmp_path, picture, transparency=b"\0\x80")), expected)


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    picture = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    red, green, blue = read(saved(tmp_path, picture, "a.jpg", quality=95))[8, 8].tolist()
    assert red < 10
    assert min(green, blue) > 245


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
@pytest.mark.parametrize(("low", "high"), [(0, 65535), (100, 4095), (300, 302)])
def test_16_bit_gray_is_stretched_from_its_own_range(tmp_path: Path, name: str, low: int, high: int) -> None:
    values = np.array([[low, low + (high - low) // 2, high]], dtype=np.uint16)
    pixels = read(saved(tmp_path, Image.fromarray(values), name))
    expected = np.rint((values.astype(float) - low) / (high - low) * 255)
    np.testing.assert_array_equal(pixels, expected[..., None].repeat(3, 2))


def test_16_bit_gray_of_one_value_is_black(tmp_path: Path) -> None:
    assert read(saved(tmp_path, Image.fromarray(np.full((4, 4), 700, dtype=np.uint16)))).max() == 0


def test_floats_are_stretched_unless_they_are_not_finite(tmp_path: Path) -> None:
    values = np.array([[-1.0, 0.0, 3.0]], dtype=np.float32)
    assert read(saved(tmp_path, Image.fromarray(values), "a.tif"))[0, :, 0].tolist() == [0, 64, 255]
    values[0, 1] = np.nan
    with pytest.raises(DataError, match="not finite"):
        read_image(saved(tmp_path, Image.fromarray(values), "a.tif"))


def turned(folder: Path, orientation: int) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(folder, Image.fromarray(RGB), exif=exif)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_obeyed(tmp_path: Path, orientation: int) -> None:
    file = turned(tmp_path, orientation)
    with Image.open(file) as picture:
        expected = np.asarray(ImageOps.exif_transpose(picture))
    np.testing.assert_array_equal(read(file), expected)
    assert read_image(file, expected.shape[:2]).shape == (3, *expected.shape[:2])


def test_pixels_stay_as_stored_where_only_that_fits_the_annotations(tmp_path: Path) -> None:
    np.testing.assert_array_equal(read_image(turned(tmp_path, 6), (5, 7)).permute(1, 2, 0).numpy(), RGB)


def test_a_damaged_exif_block_is_ignored(tmp_path: Path) -> None:
    file = saved(tmp_path, Image.fromarray(RGB), exif=b"Exif\0\0damaged")
    np.testing.assert_array_equal(read(file), RGB)


def test_another_size_than_annotated_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a.png is 7 x 5 pixels .* are for 9 x 8"):
        read_image(saved(tmp_path, Image.fromarray(RGB)), (8, 9))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.webp"])
def test_a_truncated_file_is_named(tmp_path: Path, name: str) -> None:
    file = saved(tmp_path, Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), name)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"{name} cannot be read as an image"):
        read_image(file)


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("hello")
    with pytest.raises(DataError, match=r"a.png cannot be read as an image"):
        read_image(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"none.png cannot be read as an image"):
        read_image(tmp_path / "none.png")


def test_a_huge_image_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    header = struct.pack(">IIBBBBB", 9000, 9000, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    packed = [struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks]
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))
    with pytest.raises(DataError, match=r"a.png .* 9000 x 9000 pixels is too large"):
        read_image(tmp_path / "a.png")
