"""Image files to RGB pixels, by Pillow.

- Orientation: what EXIF says is obeyed. Where the annotations' size fits only the pixels as they are stored, those are taken.
- Grey is repeated three times, palettes are looked up, CMYK is converted. Transparency is ignored: the colour beneath shows.
- Grey of 16 or 32 bits or of floats: the image's own range, least to greatest, becomes 0 to 255. Cameras of 10 to 14 bits fill
  only a part of a 16-bit file, and a fixed scale would leave a handful of grey levels. Convert to 8 bits for another scale.
- Colour of 16 bits is divided by 256 (Pillow does so). Of several frames the first is read.
"""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from maskset.data.dataset import DataError

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
            raise ValueError("it holds values that are not finite.")
        low, high = values.min(), values.max()
        picture = Image.fromarray(np.rint((values - low) * (255 / max(high - low, 1e-12))).astype(np.uint8))
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # Pillow warns where such a palette becomes RGB at once
    return picture.convert("RGB")
