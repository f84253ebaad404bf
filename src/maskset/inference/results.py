"""Results as files: COCO JSON, label images, drawn pictures. Every file is written aside and renamed, never half there."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt16
from PIL import Image

from maskset.files import written
from maskset.inference.draw import draw
from maskset.inference.pictures import Picture
from maskset.structures import Category, Instances


def save(instances: Instances, path: Path, image: Picture | None = None) -> Path:
    """Write the objects of one image and return the path; its ending chooses what is written.

    - `.json`: a COCO file of one image with its objects (with a `score` where they were found) and the classes.
    - `.png`: a label image of 16 bits, in which 0 is background, 1 the first object, 2 the second, and so on; where objects
      overlap the first one wins.
    - `.png`, `.jpg` or `.jpeg` with `image`: the image with the objects drawn on it.

    Raises:
        ValueError: the ending is none of these, or there are more objects than 16 bits can number.
    """
    ending = path.suffix.lower()
    if ending == ".json":
        name = Path(image).name if isinstance(image, (str, Path)) else ""
        _write_json(to_coco([(name, instances)], instances.categories), path)
    elif image is not None and ending in (".png", ".jpg", ".jpeg"):
        _write_picture(draw(image, instances), path)
    elif ending == ".png":
        _write_picture(Image.fromarray(label_image(instances)), path)
    elif ending in (".jpg", ".jpeg"):
        raise ValueError(f"to draw objects into {path} the image is needed: save(path, image).")
    else:
        raise ValueError(f"objects cannot be written as {path.name!r}: the ending must be .json, .png or .jpg.")
    return path


def save_all(found: Iterable[tuple[Path, Instances]], folder: str | Path, *, drawings: bool = True, labels: bool = False) -> Path:
    """Write the objects of any number of image files into a folder, which is made, and return the folder.

    `results.json` is one COCO file of all images, named from the folder that holds them all; `drawings/` has a picture of each
    image with its objects, `labels/` a label image of each (see `save`). Their names are those of the image files; of equal
    ones the later get a number.

    Args:
        found: image files and their objects, as `maskset.inference.predict.predict_files` gives them.
        folder: where to write.
        drawings: whether to draw pictures.
        labels: whether to write label images.
    """
    folder = Path(folder)
    listed: list[tuple[Path, Instances]] = []
    stems: set[str] = set()
    for file, instances in found:  # may fail at the first one: nothing is made before
        for wanted, name in ((drawings, "drawings"), (labels, "labels")):
            if wanted:
                (folder / name).mkdir(parents=True, exist_ok=True)
        stem = _unused(file.stem, stems)
        if drawings:
            save(instances, folder / "drawings" / f"{stem}.jpg", file)
        if labels:
            save(instances, folder / "labels" / f"{stem}.png")
        listed.append((Path(os.path.abspath(file)), instances))
    common = os.path.commonpath([file.parent for file, _ in listed]) if listed else ""
    named = [(file.relative_to(common).as_posix(), instances) for file, instances in listed]
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(to_coco(named, listed[0][1].categories if listed else ()), folder / "results.json")
    return folder


def to_coco(images: Iterable[tuple[str, Instances]], categories: tuple[Category, ...]) -> dict[str, Any]:
    """Return a COCO file's content for image names and their objects; image and annotation ids count from 1."""
    listed, annotations = [], []
    for number, (name, instances) in enumerate(images, 1):
        height, width = instances.masks.size
        listed.append({"id": number, "file_name": name, "height": height, "width": width})
        annotations += instances.to_coco(number)
    return {
        "images": listed,
        "annotations": [{"id": number, **row} for number, row in enumerate(annotations, 1)],
        "categories": [{"id": category.coco_id, "name": category.name} for category in categories],
    }


def label_image(instances: Instances) -> UInt16[np.ndarray, "h w"]:
    """Return for each pixel 0, or the number from 1 on of the first object that covers it.

    Raises:
        ValueError: there are more objects than 16 bits can number.
    """
    if len(instances) > 65535:
        raise ValueError(f"a label image of 16 bits can number 65535 objects, not {len(instances)}.")
    image = np.zeros(instances.masks.size, dtype=np.uint16)
    for number in range(len(instances), 0, -1):
        image[instances.masks[number - 1].dense()[0].cpu().numpy()] = number
    return image


def _write_json(content: dict[str, Any], path: Path) -> None:
    with written(path) as part:
        part.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_picture(picture: Image.Image, path: Path) -> None:
    with written(path) as part:
        if path.suffix.lower() == ".png":
            picture.save(part, "PNG")
        else:
            picture.save(part, "JPEG", quality=92, subsampling=0)  # thin coloured lines would fade with fewer colour samples


def _unused(stem: str, used: set[str]) -> str:
    """Return the stem, with a number if it is in use, and note it as used."""
    name, number = stem, 2
    while name.lower() in used:  # some file systems do not tell a from A
        name, number = f"{stem}_{number}", number + 1
    used.add(name.lower())
    return name
