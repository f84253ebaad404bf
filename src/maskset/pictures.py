"""Pictures from files, folders, patterns, Pillow, NumPy and PyTorch: all become RGB pixels.


- Orientation: what EXIF says is obeyed. Where the annotations' size fits only the pixels as they are stored, those are taken.
- Grey is repeated three times, palettes are looked up, CMYK is converted. Transparency is ignored: the colour beneath shows.
- Grey of 16 or 32 bits or of floats: the image's own range, least to greatest, becomes 0 to 255. Cameras of 10 to 14 bits fill
  only a part of a 16-bit file, and a fixed scale would leave a handful of grey levels. Convert to 8 bits for another scale.
- Colour of 16 bits is divided by 256 (Pillow does so). Of several frames the first is read.
"""

import glob
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor

from maskset.errors import DataError, MasksetError, SourceError

Picture = str | Path | Image.Image | np.ndarray | Tensor
ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")  # what is taken from a folder or by a pattern
MAX_PIXELS = 2**26  # 8192 x 8192, a little below the size at which Pillow warns of decompression bombs
MAX_SIDE = 2**15  # the rasteriser of polygons takes memory in proportion to the longer side
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
    """Return the RGB pixels of a picture.

    Args:
        picture: a file (read as `maskset.pictures` says); a Pillow image, whose EXIF orientation is obeyed; uint8 arrays
            [h w 3], [h w 4] (the last channel is ignored) or [h w]; a uint8 tensor [3 h w]. Colours are in the order RGB.

    Raises:
        SourceError: an array, tensor or Pillow image is not one of these.
        maskset.errors.DataError: a file cannot be read, or the picture is too large.
    """
    if isinstance(picture, (str, Path)):
        return read_image(picture)
    if isinstance(picture, Tensor):
        if picture.dtype != torch.uint8 or picture.ndim != 3 or picture.shape[0] != 3 or not picture.numel():
            raise SourceError(f"a tensor must be uint8 [3 h w] (RGB), got {picture.dtype} {list(picture.shape)}.")
        pixels = picture.cpu()
    else:
        pixels = torch.from_numpy(_array(picture)).permute(2, 0, 1)
    check_size((pixels.shape[1], pixels.shape[2]))
    return pixels


def files(sources: Iterable[str | Path]) -> list[Path]:
    """Return the image files that files, folders and patterns such as "photos/**/*.jpg" stand for, in order.

    A folder gives the images that lie directly in it, by name. A file that is named itself may have any ending.

    Raises:
        SourceError: a file or folder does not exist, or a folder or pattern has no image.
    """
    return [file for source in sources for file in _files(source)]


def listed(source: Picture | Sequence[Picture]) -> list[Picture]:
    """Return the pictures that a source stands for, with folders and patterns replaced by their files.

    Raises:
        SourceError: see `files`.
    """
    given = [source] if isinstance(source, (str, Path, Image.Image, np.ndarray, Tensor)) else source
    return [picture for one in given for picture in (_files(one) if isinstance(one, (str, Path)) else [one])]


def several(source: Picture | Sequence[Picture]) -> bool:
    """Return whether a source means any number of pictures: a list, a folder or a pattern."""
    if isinstance(source, (str, Path)):
        return Path(source).is_dir() or (_is_pattern(source) and not Path(source).exists())
    return not isinstance(source, (Image.Image, np.ndarray, Tensor))


def _files(source: str | Path) -> list[Path]:
    path = Path(source)
    if path.is_dir():
        found = sorted(path.iterdir())
    elif path.exists():
        return [path]
    elif _is_pattern(source):
        found = sorted(Path(name) for name in glob.glob(str(source), recursive=True))
    else:
        raise SourceError(f"there is no file or folder {source}.")
    images = [file for file in found if file.suffix.lower() in ENDINGS and file.is_file() and not file.name.startswith(".")]
    if not images:
        if path.is_dir():
            where = f"in the folder {path}"
        else:
            where = f"among the {len(found)} files and folders that {source} matches" if found else f"matches {source}"
        raise SourceError(f"no image {where}; looked for {' '.join(ENDINGS)}.")
    return images


def _is_pattern(source: str | Path) -> bool:
    return glob.has_magic(str(source))


def _array(picture: Image.Image | np.ndarray) -> UInt8[np.ndarray, "h w 3"]:
    if isinstance(picture, Image.Image):
        if picture.mode.startswith("I") or picture.mode == "F":
            raise SourceError(
                f"a Pillow image of mode {picture.mode} has no fixed range: give the file, or convert it to 8 bits."
            )
        return np.array(ImageOps.exif_transpose(picture).convert("RGB"))
    grey = picture[:, :, None].repeat(3, 2) if picture.ndim == 2 else picture
    if grey.dtype != np.uint8 or grey.ndim != 3 or grey.shape[2] not in (3, 4) or not grey.size:
        raise SourceError(f"an array must be uint8 [h w 3] (RGB) or [h w] (grey), got {picture.dtype} {list(picture.shape)}.")
    return np.ascontiguousarray(grey[:, :, :3])


def read_image(file: str | Path, size: tuple[int, int] | None = None) -> UInt8[Tensor, "3 h w"]:
    """Return the RGB pixels of an image file (a view that is channels-last in memory).

    Args:
        file: any format that Pillow reads.
        size: height and width that the annotations say.

    Raises:
        DataError: the file is missing, damaged, no image, too large, or not of that size.
    """
    try:
        with Image.open(file) as picture:
            check_size((picture.height, picture.width))
            pixels = np.array(_rgb(_upright(picture, size)))
    except Exception as error:  # Pillow's decoders meet damage with errors of every kind
        raise DataError(f"{file} cannot be read as an image: {error}") from error
    if size is not None and pixels.shape[:2] != size:
        raise DataError(
            f"{file} is {pixels.shape[1]} x {pixels.shape[0]} pixels (width x height), but its annotations are for "
            f"{size[1]} x {size[0]}: correct the JSON's width and height, or give the image that was annotated."
        )
    return torch.from_numpy(pixels).permute(2, 0, 1)


def check_size(size: tuple[int, int]) -> None:
    """Raise a DataError where an image of `size` (height, width) is larger than maskset takes."""
    if size[0] * size[1] > MAX_PIXELS or max(size) > MAX_SIDE:
        raise DataError(
            f"an image of {size[1]} x {size[0]} pixels is too large (at most {MAX_PIXELS:,} pixels, {MAX_SIDE:,} a side): "
            "cut it into tiles."
        )


def _upright(picture: Image.Image, size: tuple[int, int] | None) -> Image.Image:
    try:
        orientation = picture.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # a damaged EXIF block says nothing
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
            raise MasksetError("it holds values that are not finite.")
        low, high = values.min(), values.max()
        picture = Image.fromarray(np.rint((values - low) * (255 / max(high - low, 1e-12))).astype(np.uint8))
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # Pillow warns where such a palette becomes RGB at once
    return picture.convert("RGB")
