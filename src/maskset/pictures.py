"""Reading of images as RGB pixels from files, folders, patterns, bytes, Pillow, NumPy and PyTorch.

- EXIF orientation is applied, unless only the stored orientation fits the annotated size.
- Gray is repeated in three channels; palettes and CMYK are converted; transparency is ignored.
- Gray images of 16 or 32 bits or floats are scaled from their own range to 0 to 255. Cameras of 10 to 14 bits use only part of
  the 16 bits, so a fixed scale would leave few gray levels. Convert to 8 bits yourself for another scale.
- Color of 16 bits is divided by 256 (by Pillow). Of several frames, the first is read.
"""

import glob
import io
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from maskset.errors import DataError, SourceError

Picture = str | Path | bytes | io.IOBase | Image.Image | np.ndarray | Tensor
ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")  # read from folders and by patterns
MAX_PIXELS = 2**26  # 8192 x 8192, a little below the size at which Pillow warns of decompression bombs
MAX_SIDE = 2**15  # the rasterizer of polygons takes memory in proportion to the longer side
_ACCEPTED = (
    "An image is a file name, bytes, a file opened in binary mode, a Pillow image, a uint8 array [h w 3] (RGB) or [h w] (gray), "
    "or a uint8 tensor [3 h w]; several images are a list of these, a folder, or a pattern such as 'photos/*.jpg'."
)
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read(picture: Picture) -> UInt8[Tensor, "3 h w"]:
    """Return the RGB pixels of an image.

    Args:
        picture: a file name, the bytes of an image file, or a file opened in binary mode; a Pillow image, whose EXIF orientation
            is applied; a uint8 array [h w 3], [h w 4] (the last channel is ignored) or [h w]; a uint8 tensor [3 h w].
            Channels are in the order RGB.

    Raises:
        SourceError: it is none of these.
        DataError: a file cannot be read, or the image is too large.
    """
    check(picture)
    if isinstance(picture, (str, Path)):
        return read_image(picture)
    if isinstance(picture, Tensor):
        pixels = picture.cpu()
    elif isinstance(picture, np.ndarray):
        rgb = picture[:, :, None].repeat(3, 2) if picture.ndim == 2 else picture[:, :, :3]
        pixels = torch.from_numpy(np.ascontiguousarray(rgb)).permute(2, 0, 1)
    elif isinstance(picture, Image.Image):
        check_image_size((picture.height, picture.width))
        try:
            pixels = torch.from_numpy(np.array(ImageOps.exif_transpose(picture).convert("RGB"))).permute(2, 0, 1)
        except (OSError, SyntaxError, ValueError) as error:  # Pillow reads the file only now
            raise DataError(f"the Pillow image cannot be read: {error}") from error
    else:
        return _decode(io.BytesIO(picture) if isinstance(picture, bytes) else picture, "the file in memory", None)
    check_image_size((pixels.shape[1], pixels.shape[2]))
    return pixels


def check(picture: Any) -> None:
    """Check that `read` takes an image of this type and shape; the contents of files are not read.

    Raises:
        SourceError: it does not. The message says what it takes.
    """
    if isinstance(picture, Tensor):
        usable = picture.dtype == torch.uint8 and picture.ndim == 3 and picture.shape[0] == 3 and picture.numel() > 0
        problem = f"a tensor must be uint8 [3 h w], got {picture.dtype} {list(picture.shape)}"
    elif isinstance(picture, np.ndarray):
        shape_fits = picture.ndim == 2 or (picture.ndim == 3 and picture.shape[2] in (3, 4))
        usable = picture.dtype == np.uint8 and shape_fits and picture.size > 0
        problem = f"an array must be uint8 [h w 3] or [h w], got {picture.dtype} {list(picture.shape)}"
    elif isinstance(picture, Image.Image):
        usable = picture.mode != "F" and not picture.mode.startswith("I")
        problem = f"a Pillow image of mode {picture.mode} has no fixed range: give the file, or convert it to 8 bits"
    elif hasattr(picture, "read") and hasattr(picture, "seek"):
        usable = _is_binary(picture)
        problem = "the file is closed" if getattr(picture, "closed", False) else "a file must be opened as open(name, 'rb')"
    else:
        usable = isinstance(picture, (str, Path, bytes))
        problem = f"{type(picture).__name__} is not an image"
    if isinstance(picture, (str, bytes)) and not picture:
        usable, problem = False, f"the {'file name is' if isinstance(picture, str) else 'bytes of the image are'} empty"
    if not usable:
        raise SourceError(f"{problem}. {_ACCEPTED}")


def _is_binary(file: Any) -> bool:
    try:
        return isinstance(file.read(0), bytes)
    except (OSError, ValueError):  # closed, or not opened for reading
        return False


def is_single(source: Any) -> bool:
    """Return whether a source is one image, as opposed to a sequence, a folder or a pattern."""
    if isinstance(source, bytes):
        return True
    if isinstance(source, (str, Path)):
        return not Path(source).is_dir() and (Path(source).exists() or not _is_pattern(source))
    return not isinstance(source, Sequence)


def expand(source: Any) -> list[Picture]:
    """Return the images of a source, with folders and patterns replaced by their files.

    Raises:
        SourceError: see `check` and `expand_files`.
    """
    pictures: list[Any] = list(source) if isinstance(source, Sequence) and not isinstance(source, (str, bytes)) else [source]
    for picture in pictures:
        check(picture)
    return [image for picture in pictures for image in (_files(picture) if isinstance(picture, (str, Path)) else [picture])]


def expand_files(sources: str | Path | Iterable[str | Path]) -> list[Path]:
    """Return the image files that files, folders and patterns such as "photos/**/*.jpg" stand for, in order.

    A folder stands for the images directly in it, sorted by name. A file that is named itself may have any ending.

    Raises:
        SourceError: a file or folder does not exist or is a device, a folder or pattern has no image, or a source is not a name.
    """
    sources = [sources] if isinstance(sources, (str, Path)) else list(sources)
    for source in sources:
        if not isinstance(source, (str, Path)) or not str(source):
            raise SourceError(f"the name of an image file, a folder or a pattern is needed, got {source!r}.")
    return [file for source in sources for file in _files(source)]


def _files(source: str | Path) -> list[Path]:
    path = Path(source)
    if path.is_dir():
        candidates = sorted(path.iterdir())
    elif path.is_file():
        return [path]
    elif path.exists():
        raise SourceError(f"{source} is not a regular file or a folder.")  # reading a pipe could wait forever
    elif _is_pattern(source):
        candidates = sorted(Path(name) for name in glob.glob(str(source), recursive=True))
    else:
        advice = " Download it, and give the file." if "://" in str(source) else ""
        raise SourceError(f"there is no file or folder {source}.{advice}")
    images = [file for file in candidates if file.suffix.lower() in ENDINGS and file.is_file() and not file.name.startswith(".")]
    if not images:
        where = f"in the folder {path}" if path.is_dir() else f"among the {len(candidates)} matches of {source}"
        raise SourceError(f"there is no image {where}; images end in {' '.join(ENDINGS)}.")
    return images


def _is_pattern(source: str | Path) -> bool:
    return glob.has_magic(str(source))


def read_image(file: str | Path, size: tuple[int, int] | None = None) -> UInt8[Tensor, "3 h w"]:
    """Return the RGB pixels of an image file (a view that is channels-last in memory).

    Args:
        file: in any format that Pillow decodes itself.
        size: annotated height and width.

    Raises:
        DataError: the file is missing, not a regular file, damaged, not an image, too large, or not of that size.
    """
    return _decode(file, str(file), size)


def _decode(file: str | Path | io.IOBase, name: str, size: tuple[int, int] | None) -> UInt8[Tensor, "3 h w"]:
    try:
        if isinstance(file, (str, Path)) and not stat.S_ISREG(os.stat(file).st_mode):
            raise DataError("it is not a regular file.")  # reading a pipe could wait forever
        with Image.open(file) as picture:  # type: ignore[arg-type]  # Pillow's stubs do not know io.IOBase
            if picture.format == "EPS":
                raise DataError("EPS files contain programs and are not supported.")
            check_image_size((picture.height, picture.width))
            pixels = np.array(_rgb(_upright(picture, size)))
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise errors of every kind for damaged files
        reason = "its format is not known." if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"{name} cannot be read as an image: {reason}") from error
    if size is not None and pixels.shape[:2] != size:
        raise DataError(
            f"{name} is {pixels.shape[1]} x {pixels.shape[0]} pixels (width x height), but its annotations are for "
            f"{size[1]} x {size[0]}: correct the JSON's width and height, or give the image that was annotated."
        )
    return torch.from_numpy(pixels).permute(2, 0, 1)


def check_image_size(size: tuple[int, int]) -> None:
    """Check that an image of `size` (height, width) is not too large.

    Raises:
        DataError: it has more than MAX_PIXELS pixels, or a side longer than MAX_SIDE.
    """
    if size[0] * size[1] > MAX_PIXELS or max(size) > MAX_SIDE:
        raise DataError(
            f"an image of {size[1]} x {size[0]} pixels is too large (at most {MAX_PIXELS:,} pixels, {MAX_SIDE:,} a side): "
            "cut it into tiles."
        )


def _upright(picture: Image.Image, size: tuple[int, int] | None) -> Image.Image:
    try:
        orientation = picture.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # a damaged EXIF block is ignored
        orientation = 1
    turn = _UPRIGHT.get(orientation)
    if turn is None:
        return picture
    upright = picture.transpose(turn)
    stored_fits = size == (picture.height, picture.width) != (upright.height, upright.width)
    return picture if stored_fits else upright


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.asarray(picture).astype(np.float64)
        if not np.isfinite(values).all():
            raise DataError("it has values that are not finite.")
        low, high = values.min(), values.max()
        picture = Image.fromarray(np.rint((values - low) * (255 / max(high - low, 1e-12))).astype(np.uint8))
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # Pillow warns if such a palette is converted to RGB directly
    return picture.convert("RGB")
