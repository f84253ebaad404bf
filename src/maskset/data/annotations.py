"""A COCO JSON file, checked and packed. Nothing that it says reaches pycocotools' C code, or a file name the disk, unchecked."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int64

from maskset import rle
from maskset.data.dataset import ImageRecord
from maskset.errors import DataError
from maskset.instances import Category
from maskset.pictures import check_size


class Ragged:
    """Arrays of various lengths, one after the other in a single one."""

    def __init__(self, arrays: Sequence[np.ndarray], dtype: type[np.generic]) -> None:
        self._starts = _starts(np.array([array.size for array in arrays], dtype=np.int64))
        self._values = np.concatenate([array.reshape(-1) for array in arrays] or [np.zeros(0)]).astype(dtype, copy=False)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._values[self._starts[index] : self._starts[index + 1]]


@dataclass(frozen=True)
class Annotations:
    """All annotations of a data set, in the order of the images.

    They lie in a few large arrays, because worker processes share those with their parent: a million small Python objects
    would be copied, page by page, into each of them.

    Attributes:
        starts: image i has the annotations starts[i] to starts[i + 1].
        labels: class, a position in the categories.
        boxes: x0 y0 x1 y1, pixels, inside of the image.
        areas: pixels, as the file says.
        crowd: whether it marks a region of many objects.
    """

    starts: Int64[np.ndarray, "images_and_one"]
    labels: Int64[np.ndarray, "n"]
    boxes: Float32[np.ndarray, "n 4"]
    areas: Float64[np.ndarray, "n"]
    crowd: Bool[np.ndarray, "n"]
    _polygons: Ragged
    _polygon_starts: Int64[np.ndarray, "n_and_one"]
    _runs: Ragged

    def shape(self, index: int) -> rle.Counts | rle.Polygons:
        """Return the mask of an annotation as the file has it."""
        first, last = self._polygon_starts[index : index + 2]
        if first == last:
            return torch.from_numpy(self._runs[index].copy())
        return tuple(self._polygons[part].reshape(-1, 2) for part in range(first, last))


@dataclass(frozen=True)
class _Row:
    """One annotation, checked."""

    image: int  # position in the list of images
    label: int
    box: tuple[float, float, float, float]
    area: float
    crowd: bool
    shape: rle.Counts | rle.Polygons


def read_json(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the images, annotations and categories of a COCO file, unchecked but for being lists of objects.

    Raises:
        DataError: it cannot be read, is no JSON, or lacks one of the lists.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}): is the file whole?") from None
    lists = {}
    for key in ("images", "annotations", "categories"):
        lists[key] = value = content.get(key) if isinstance(content, dict) else None
        if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
            raise DataError(f"{path} is no COCO annotation file: it needs {key!r}, a list of objects.")
    return lists


def read_categories(rows: list[dict[str, Any]], path: Path) -> tuple[Category, ...]:
    """Return the categories in the order of their ids. Names that occur twice get their id: "fish (id 1)".

    Raises:
        DataError: there is none, an id occurs twice, or one has no whole number as id or no name.
    """
    if not rows:
        raise DataError(f"{path} lists no categories.")
    for row in rows:
        if type(row.get("id")) is not int or not isinstance(row.get("name"), str):
            raise DataError(f"{path}: a category needs 'id', a whole number, and 'name', a text; got {row!r:.200}.")
    rows = sorted(rows, key=lambda row: row["id"])
    ids, names = [row["id"] for row in rows], [row["name"] for row in rows]
    if len(set(ids)) < len(ids):
        raise DataError(f"{path}: a category id occurs twice in {ids}.")
    unique = [name if names.count(name) == 1 else f"{name} (id {id})" for id, name in zip(ids, names, strict=True)]
    return tuple(Category(name, id) for id, name in zip(ids, unique, strict=True))


def read_image_records(rows: list[dict[str, Any]], folder: Path, problems: list[str]) -> list[ImageRecord]:
    """Return what the file says of the images, without those that are broken; a message on each of these goes to `problems`."""
    records, ids, present = [], set(), {}
    for position, row in enumerate(rows):
        try:
            record = _image_record(row, folder)
            if record.id in ids:
                raise DataError("the id occurs twice.")
            parent = record.file.parent  # type: ignore[union-attr]
            if parent not in present:  # a list of the folder is faster than asking for 100,000 files
                present[parent] = {file.name for file in parent.iterdir()} if parent.is_dir() else set()
            if record.file.name not in present[parent]:  # type: ignore[union-attr]
                raise DataError(f"there is no file {record.file}.")
        except DataError as error:
            name = row.get("file_name")
            problems.append(f"image {row.get('id', f'number {position}')!s:.50} ({name!s:.200}): {error}")
            continue
        ids.add(record.id)
        records.append(record)
    return records


def read_annotations(
    rows: list[dict[str, Any]],
    records: Sequence[ImageRecord],
    known_images: set[Any],
    categories: Sequence[Category],
    problems: list[str],
) -> Annotations:
    """Return the annotations of the images in `records`, packed.

    Args:
        rows: as the file has them. Their segmentations are taken out, which frees the memory as the work goes on.
        records: the images, in their order.
        known_images: ids of all images of the file. Annotations of those that are not in `records` are left out.
        categories: what the labels stand for.
        problems: gets a message on each broken annotation; those are left out.
    """
    position_of = {record.id: position for position, record in enumerate(records)}
    label_of = {category.coco_id: label for label, category in enumerate(categories)}
    ids, checked = set(), []
    for position, row in enumerate(rows):
        id, image_id = row.get("id", f"number {position}"), row.get("image_id")
        if type(image_id) is int and image_id in known_images and image_id not in position_of:
            continue
        where = f"annotation {id!s:.50}"
        try:
            if type(image_id) is not int or image_id not in position_of:
                raise DataError(f"there is no image {image_id!r:.50}.")
            record = records[position_of[image_id]]
            where = f"{where} (image {image_id}, {record.file and record.file.name})"
            if not isinstance(id, (int, str)) or id in ids:
                raise DataError("the id occurs twice." if isinstance(id, (int, str)) else "the id is no number.")
            ids.add(id)
            one = _row(row, position_of[image_id], (record.height, record.width), label_of)
        except (DataError, rle.MaskError) as error:
            problems.append(f"{where}: {error}")
            continue
        if one is not None:
            checked.append(one)
    return _pack(checked, len(records))


def _image_record(row: dict[str, Any], folder: Path) -> ImageRecord:
    id, name = row.get("id"), row.get("file_name")
    if type(id) is not int:
        raise DataError("the image's 'id' must be a whole number.")
    if not isinstance(name, str) or not name or "\0" in name:
        raise DataError("the image needs 'file_name', a text.")
    for parts in (PurePosixPath(name), PureWindowsPath(name)):
        if ".." in parts.parts or parts.root or parts.drive:
            raise DataError(f"'file_name' must lie inside of the image folder {folder}.")
    size = row.get("height"), row.get("width")
    if not all(isinstance(side, (int, float)) and side >= 1 and side == side // 1 for side in size):
        raise DataError(f"'height' and 'width' must be whole numbers from 1, got {size[0]!r:.50} and {size[1]!r:.50}.")
    height, width = int(size[0]), int(size[1])  # type: ignore[arg-type]
    check_size((height, width))
    return ImageRecord(id, folder / name, height, width)


def _row(row: dict[str, Any], image: int, size: tuple[int, int], label_of: dict[int, int]) -> _Row | None:
    """Return an annotation, checked; None where its box, cut to the image, is empty."""
    category, crowd, area = row.get("category_id"), row.get("iscrowd", 0), row.get("area")
    if type(category) is not int or category not in label_of:
        raise DataError(f"there is no category {category!r:.50}, the file has {_listed(sorted(label_of))}.")
    if crowd not in (0, 1):
        raise DataError(f"'iscrowd' must be 0 or 1, got {crowd!r:.50}.")
    shape = rle.from_coco(row.pop("segmentation", None), size)
    box = _box(row["bbox"], size) if row.get("bbox") is not None else rle.box(_runs(shape, size), size[0])
    if not (box[2] > box[0] and box[3] > box[1]):
        return None
    if area is None:
        area = rle.area(_runs(shape, size))
    if not _is_finite_number(area):
        raise DataError(f"'area' must be a finite number, got {area!r:.50}.")
    return _Row(image, label_of[category], box, area, bool(crowd), shape)


def _box(box: Any, size: tuple[int, int]) -> tuple[float, float, float, float]:
    if not isinstance(box, list) or len(box) != 4 or not all(_is_finite_number(value) for value in box):
        raise DataError(f"'bbox' must be four finite numbers x, y, width, height, got {box!r:.100}.")
    x, y, width, height = box
    limits = size[1], size[0], size[1], size[0]
    x0, y0, x1, y1 = (
        float(min(max(value, 0), limit)) for value, limit in zip((x, y, x + width, y + height), limits, strict=True)
    )
    return x0, y0, x1, y1


def _runs(shape: rle.Counts | rle.Polygons, size: tuple[int, int]) -> rle.Counts:
    return rle.from_polygons(shape, size) if isinstance(shape, tuple) else shape


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and -1e300 < value < 1e300  # also false for NaN


def _listed(ids: list[int]) -> str:
    return ", ".join(map(str, ids)) if len(ids) <= 10 else f"{len(ids)} from {ids[0]} to {ids[-1]}"


def _pack(rows: list[_Row], images: int) -> Annotations:
    rows.sort(key=lambda row: row.image)
    no_runs = np.zeros(0, dtype=np.int32)
    return Annotations(
        starts=np.searchsorted([row.image for row in rows], np.arange(images + 1)),
        labels=np.array([row.label for row in rows], dtype=np.int64),
        boxes=np.array([row.box for row in rows], dtype=np.float32).reshape(-1, 4),
        areas=np.array([row.area for row in rows], dtype=np.float64),
        crowd=np.array([row.crowd for row in rows], dtype=bool),
        _polygons=Ragged(list(_polygons(rows)), np.float64),
        _polygon_starts=_starts(np.array([len(row.shape) * isinstance(row.shape, tuple) for row in rows], dtype=np.int64)),
        _runs=Ragged([no_runs if isinstance(row.shape, tuple) else row.shape.numpy() for row in rows], np.int32),
    )


def _polygons(rows: list[_Row]) -> Iterator[np.ndarray]:
    return (part for row in rows if isinstance(row.shape, tuple) for part in row.shape)


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, dtype=np.int64), lengths.cumsum()])
