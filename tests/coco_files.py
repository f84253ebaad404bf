"""Small COCO data sets on disk, whole or broken on purpose."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = (30, 40)  # height, width of every picture
TRIANGLE = [[1, 2, 21, 2, 21, 22]]


def annotation(id: int = 1, image: int = 1, category: int = 7, **changes: Any) -> dict[str, Any]:
    """Return an annotation; what is given as None is left out."""
    row = {"id": id, "image_id": image, "category_id": category, "bbox": [1, 2, 20, 20], "area": 200, "iscrowd": 0}
    return {key: value for key, value in (row | {"segmentation": TRIANGLE} | changes).items() if value is not None}


def image(id: int = 1, **changes: Any) -> dict[str, Any]:
    """Return an image's entry."""
    return {"id": id, "file_name": f"{id}.png", "height": SIZE[0], "width": SIZE[1]} | changes


def coco(annotations: list[dict[str, Any]], images: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Return the content of a COCO file, with categories of the ids 7 and 0."""
    categories = [{"id": 7, "name": "cat"}, {"id": 0, "name": "dog"}]
    return {"images": [image()] if images is None else images, "annotations": annotations, "categories": categories}


def write(folder: Path, content: Any, split: str = "train") -> Path:
    """Write instances_<split>.json and a picture for each plain file name, and return the folder."""
    (folder / split).mkdir(parents=True, exist_ok=True)
    (folder / f"instances_{split}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    names = [record.get("file_name") for record in content["images"]] if isinstance(content, dict) and "images" in content else []
    for name in names:
        if isinstance(name, str) and Path(name).name == name and "\0" not in name:
            pixels = np.random.default_rng(len(name)).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / split / name)
    return folder
