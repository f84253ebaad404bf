"""Predictions of many image files as one folder: COCO JSON, drawings, label images."""

import os
from collections.abc import Iterable
from pathlib import Path

from maskset.files import write_json
from maskset.instances.instances import Instances, coco_file


def save_predictions(
    found: Iterable[tuple[Path, Instances]], folder: str | Path, *, drawings: bool = True, labels: bool = False
) -> Path:
    """Write the objects of any number of image files into a folder, which is made, and return the folder.

    `results.json` is one COCO file of all images, named from the folder that holds them all; `drawings/` has a picture of each
    image with its objects, `labels/` a label image of each (see `Instances.save`). They are named like the image files; of equal
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
            instances.save(folder / "drawings" / f"{stem}.jpg", file)
        if labels:
            instances.save(folder / "labels" / f"{stem}.png")
        listed.append((Path(os.path.abspath(file)), instances))
    common = os.path.commonpath([file.parent for file, _ in listed]) if listed else ""
    named = [(file.relative_to(common).as_posix(), instances) for file, instances in listed]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(coco_file(named, listed[0][1].categories if listed else ()), folder / "results.json")
    return folder


def _unused(stem: str, used: set[str]) -> str:
    """Return the stem, with a number if it is in use, and note it as used."""
    name, number = stem, 2
    while name.lower() in used:  # some file systems do not tell a from A
        name, number = f"{stem}_{number}", number + 1
    used.add(name.lower())
    return name
