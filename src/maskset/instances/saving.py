"""Saving the predictions of many image files in one folder: COCO JSON, drawings, label images."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

from maskset.files import lock_folder, write_json
from maskset.instances.instances import Instances, coco_file


def save_predictions(
    predictions: Iterable[tuple[Path, Instances]], folder: str | Path, *, drawings: bool = True, labels: bool = False
) -> Path:
    """Write the objects of any number of image files to a folder, and return the folder.

    `results.json` is one COCO file of all images, whose names are relative to their common folder. `drawings/` gets a drawing
    of each image, and `labels/` a label image of each (see `Instances.save`), named like the image files; a number is appended
    to names that are taken. The folder is created when the first image is done. Everything is written aside, in `.unfinished`,
    and earlier predictions in the folder are replaced when all images are done: an image may be a drawing of them.

    Args:
        predictions: image files and their objects, as from `maskset.inference.predict.predict_files`.
        folder: where to write.
        drawings: whether to write drawings.
        labels: whether to write label images.

    Raises:
        ConfigError: another process is writing predictions to the folder.
    """
    folder, predictions = Path(folder), iter(predictions)
    first = next(predictions, None)  # may fail, for example for a broken file: nothing is written before
    images: list[tuple[Path, Instances]] = []
    stems: set[str] = set()
    with lock_folder(folder), _unfinished_folder(folder) as unfinished:
        earlier = _earlier_files(folder)
        for file, instances in chain([] if first is None else [first], predictions):
            stem = _unused(file.stem, stems)
            if drawings:
                instances.save(unfinished / "drawings" / f"{stem}.jpg", file)
            if labels:
                instances.save(unfinished / "labels" / f"{stem}.png")
            images.append((Path(os.path.abspath(file)), instances))
        common = os.path.commonpath([file.parent for file, _ in images]) if images else ""
        named = [(file.relative_to(common).as_posix(), instances) for file, instances in images]
        write_json(coco_file(named, images[0][1].categories if images else ()), folder / "results.json")
        for file in earlier:
            file.unlink(missing_ok=True)
        for file in unfinished.glob("*/*"):
            target = folder / file.relative_to(unfinished)
            target.parent.mkdir(exist_ok=True)
            file.replace(target)
    return folder


@contextmanager
def _unfinished_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder inside a locked one for what is not finished, and remove it at the end."""
    path = folder / ".unfinished"
    shutil.rmtree(path, ignore_errors=True)  # of a process that was killed
    for name in ("drawings", "labels"):
        (path / name).mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _earlier_files(folder: Path) -> set[Path]:
    """Return the drawings and label images that belong to the results.json of earlier predictions in the folder."""
    stems: set[str] = set()
    try:
        images = json.loads((folder / "results.json").read_bytes())["images"]
        names = [_unused(Path(image["file_name"]).stem, stems) for image in images]
    except (OSError, ValueError, KeyError, TypeError):  # there are none, or the file was not written by maskset
        return set()
    return {folder / kind / f"{name}{ending}" for name in names for kind, ending in (("drawings", ".jpg"), ("labels", ".png"))}


def _unused(stem: str, used: set[str]) -> str:
    """Return the stem, with a number if it is used already, and add it to the used ones."""
    name, number = stem, 2
    while name.lower() in used:  # some file systems do not distinguish a from A
        name, number = f"{stem}_{number}", number + 1
    used.add(name.lower())
    return name
