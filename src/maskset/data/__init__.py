"""Data sets: COCO files and generated shapes. `open_data` opens both."""

import glob
import logging
from pathlib import Path

from maskset.data.coco import CocoDataset
from maskset.data.dataset import Dataset, ImageRecord
from maskset.data.shapes import ShapesDataset
from maskset.errors import DataError
from maskset.messages import first_names

__all__ = ["CocoDataset", "DataError", "Dataset", "ImageRecord", "ShapesDataset", "open_data"]


def open_data(
    data: str | Path, split: str, images: str | Path | None = None, skip_broken: bool = False
) -> CocoDataset | ShapesDataset:
    """Return a data set.

    Args:
        data: a folder in one of the layouts below, a COCO JSON file, or "shapes:" for generated data. "shapes" means the same
            unless there is a file or folder of that name.
        split: which part of a folder or of the generated data, such as "train" or "val". A JSON file has no parts.
        images: for a JSON file, the folder that its file names are relative to. By default the image folder that belongs to a
            file instances_NAME.json in one of the layouts, else the folder of the file.
        skip_broken: leave out broken images and annotations, and list them in `skipped`, instead of raising an error.

    Layouts of a folder:

    - `annotations/instances_<split>*.json` with an image folder named like the end of the file, such as `train2017/`
    - `instances_<split>.json` with the images in `<split>/`
    - `<split>/_annotations.coco.json` in the image folder, which may be `valid` for the split `val`

    Raises:
        DataError: there is no data in one of these forms, or the files are broken.
    """
    if not str(data):
        raise DataError("the name of the data is empty: give a data folder, a COCO JSON file, or shapes: (generated).")
    path = Path(data)
    if data == "shapes:" or (data == "shapes" and not path.exists()):
        return ShapesDataset(split)
    if data == "shapes":
        logging.getLogger("maskset").warning("note: reading %s; for generated data give shapes:", path.absolute())
    if path.is_dir():
        if images is not None:
            raise DataError(f"{path} is a folder: --images cannot be combined with a folder, only with a COCO JSON file.")
        file, folder = _find_split(path, split)
    elif path.is_file():
        file, folder = path, Path(images) if images is not None else _images_beside(path)
    else:
        raise DataError(f"there is no file or folder {path}; give a data folder, a COCO JSON file, or shapes: (generated).")
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder} with the images of {file}; with a JSON file, --images says where they are.")
    return CocoDataset(file, folder, skip_broken)


def _find_split(folder: Path, split: str) -> tuple[Path, Path]:
    """Return the JSON file and the image folder of a split."""
    files = sorted(folder.glob(f"annotations/instances_{glob.escape(split)}*.json"))
    files = [file for file in files if file.stem == f"instances_{split}"] or files
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise DataError(
            f"{folder / 'annotations'} contains several files for {split!r} ({names}): give one of them, with --images."
        )
    if (folder / f"instances_{split}.json").is_file():
        files.append(folder / f"instances_{split}.json")
    if files:
        return files[0], _layout_images(files[0])
    for name in (split, "valid") if split == "val" else (split,):
        if (folder / name / "_annotations.coco.json").is_file():
            return folder / name / "_annotations.coco.json", folder / name
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    also = " or valid/_annotations.coco.json" if split == "val" else ""
    raise DataError(
        f"{folder} does not contain annotations of {split!r}. Looked for annotations/instances_{split}*.json with an image "
        f"folder {split}*/, for instances_{split}.json with {split}/, and for {split}/_annotations.coco.json{also}. "
        f"The folder contains: {first_names(names, 12)}."
    )


def _layout_images(file: Path) -> Path:
    """Return the image folder of a file instances_NAME.json: NAME/ beside it, or beside its folder annotations/."""
    parent = file.absolute().parent
    return (parent.parent if parent.name == "annotations" else parent) / file.stem.removeprefix("instances_")


def _images_beside(file: Path) -> Path:
    images = _layout_images(file)
    return images if file.stem.startswith("instances_") and images.is_dir() else file.parent
