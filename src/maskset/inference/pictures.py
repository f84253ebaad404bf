"""What a prediction can be asked for: files, folders, patterns, and pictures in memory. All become RGB pixels."""

import glob
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor

from maskset.data.images import check_size, read_image

Picture = str | Path | Image.Image | np.ndarray | Tensor
ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")  # what is taken from a folder or by a pattern


class SourceError(ValueError):
    """There is nothing to predict, or it is no image; the message says what was looked for and what is taken."""


def read(picture: Picture) -> UInt8[Tensor, "3 h w"]:
    """Return the RGB pixels of a picture.

    Args:
        picture: a file (read as `maskset.data.images` says); a Pillow image, whose EXIF orientation is obeyed; uint8 arrays
            [h w 3], [h w 4] (the last channel is ignored) or [h w]; a uint8 tensor [3 h w]. Colours are in the order RGB.

    Raises:
        SourceError: an array, tensor or Pillow image is not one of these.
        maskset.data.dataset.DataError: a file cannot be read, or the picture is too large.
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
