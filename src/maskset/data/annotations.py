"""Reading of COCO JSON files. Every value is checked before C code uses it, and every file name before a file is opened."""

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
from maskset.pictures import check_image_size

_NO_BOX = "have an empty or invalid bbox, so the box of their mask is used"
_NO_MASK = "have neither a box nor a mask inside the image, so they are left out"
_MISMATCHED_BOX = "have a bbox (used as it is) that contradicts their mask; it should be x, y, width, height"
_LEAST_IOU = 0.5  # of an annotated box and the box of its mask; fewer than 1 in 1,000 boxes of COCO are below


class Ragged:
    """Arrays of different lengths, stored in one array."""

    def __init__(self, arrays: Sequence[np.ndarray], dtype: type[np.generic]) -> None:
        self._starts = _starts(np.array([array.size for array in arrays], dtype=np.int64))
        self._values = np.concatenate([array.reshape(-1) for array in arrays] or [np.zeros(0)]).astype(dtype, copy=False)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._values[self._starts[index] : self._starts[index + 1]]


@dataclass(frozen=True)
class Annotations:
    """All annotations of a data set, in the order of the images.

    They are a few large arrays, because worker processes share those with their parent process. A million small Python objects
    would be copied into each worker, as their reference counts change.

    Attributes:
        starts: image i has the annotations starts[i] to starts[i + 1].
        labels: classes, as positions in the categories.
        boxes: x0 y0 x1 y1, pixels, inside the image.
        areas: pixels, as annotated.
        crowd: whether an annotation marks a region of many objects.
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
        """Return the mask of an annotation as it is in the file: polygons or run lengths."""
        first, last = self._polygon_starts[index : index + 2]
        if first == last:
            return torch.from_numpy(self._runs[index].copy())
        return tuple(self._polygons[part].reshape(-1, 2) for part in range(first, last))


@dataclass(frozen=True)
class _Row:
    """One checked annotation."""

    image: int  # position in the list of images
    label: int
    box: tuple[float, float, float, float]
    area: float
    crowd: bool
    shape: rle.Counts | rle.Polygons


def read_json(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the images, annotations and categories of a COCO file: lists of objects whose content is not checked yet.

    Raises:
        DataError: the file cannot be read, is not JSON, or lacks one of the lists.
    """
    try:
        content = json.loads(path.read_bytes())
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}): is the file complete?") from None
    lists = {}
    for key in ("images", "annotations", "categories"):
        lists[key] = value = content.get(key) if isinstance(content, dict) else None
        if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
            raise DataError(f"{path} is not a COCO annotation file: it needs {key!r}, a list of objects.")
    return lists


def read_categories(rows: list[dict[str, Any]], path: Path) -> tuple[Category, ...]:
    """Return the categories in the order of their ids. The id is added to names that occur twice: "fish (id 1)".

    Raises:
        DataError: there is no category, an id occurs twice, or a category lacks a name or a whole number as id.
    """
    if not rows:
        raise DataError(f"{path} lists no categories.")
    for row in rows:
        if whole_number(row.get("id")) is None or not isinstance(row.get("name"), str):
            raise DataError(f"{path}: a category needs 'id', a whole number, and 'name', a text; got {row!r:.200}.")
    pairs = sorted((int(row["id"]), row["name"]) for row in rows)
    ids, names = [id for id, _ in pairs], [name for _, name in pairs]
    if len(set(ids)) < len(ids):
        raise DataError(f"{path}: a category id occurs twice in {ids}.")
    unique = [name if names.count(name) == 1 else f"{name} (id {id})" for id, name in zip(ids, names, strict=True)]
    return tuple(Category(name, id) for id, name in zip(ids, unique, strict=True))


def read_image_records(rows: list[dict[str, Any]], folder: Path, problems: list[str]) -> list[ImageRecord]:
    """Return a record of each valid image; a message on each broken one is added to `problems`."""
    records, ids, present = [], set(), {}
    for position, row in enumerate(rows):
        try:
            record = _image_record(row, folder)
            if record.id in ids:
                raise DataError("the id occurs twice.")
            parent = record.file.parent  # type: ignore[union-attr]
            if parent not in present:  # listing the folder is faster than checking 100,000 files
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
    known_images: set[int],
    categories: Sequence[Category],
    problems: list[str],
) -> tuple[Annotations, list[str]]:
    """Return the annotations of the images in `records`, and warnings about them.

    Args:
        rows: the annotations of the file. Their segmentations are removed to free memory.
        records: the images, in the order of the data set.
        known_images: ids of all images of the file. Annotations of those that are not in `records` are left out.
        categories: the classes, in the order of the labels.
        problems: a message on each broken annotation is added here; these are left out.
    """
    warnings: dict[str, list[str]] = {_NO_BOX: [], _NO_MASK: [], _MISMATCHED_BOX: []}
    position_of = {record.id: position for position, record in enumerate(records)}
    label_of = {category.coco_id: label for label, category in enumerate(categories)}
    ids, checked = set(), []
    for position, row in enumerate(rows):
        id, image_id = row.get("id", f"number {position}"), whole_number(row.get("image_id"))
        if image_id in known_images and image_id not in position_of:
            continue
        where = f"annotation {id!s:.50}"
        try:
            if image_id is None or image_id not in position_of:
                raise DataError(f"there is no image {row.get('image_id')!r:.50}.")
            record = records[position_of[image_id]]
            where = f"{where} (image {image_id}, {record.file and record.file.name})"
            key = id if isinstance(id, str) else whole_number(id)
            if key is None or key in ids:
                raise DataError("the id must be a whole number or text." if key is None else "the id occurs twice.")
            ids.add(key)
            annotation = _row(row, where, position_of[image_id], (record.height, record.width), label_of, warnings)
        except (DataError, rle.MaskError) as error:
            problems.append(f"{where}: {error}")
            continue
        if annotation is not None:
            checked.append(annotation)
    notes = [
        f"{len(names)} of {len(rows)} annotations {kind}. The first: {names[0]}." for kind, names in warnings.items() if names
    ]
    return _pack(checked, len(records)), notes


def _image_record(row: dict[str, Any], folder: Path) -> ImageRecord:
    id, name = whole_number(row.get("id")), row.get("file_name")
    if id is None:
        raise DataError("the image's 'id' must be a whole number.")
    if not isinstance(name, str) or not name or "\0" in name:
        raise DataError("the image needs 'file_name', a text.")
    for parts in (PurePosixPath(name), PureWindowsPath(name)):
        if ".." in parts.parts or parts.root or parts.drive:
            raise DataError(f"'file_name' must lie inside the image folder {folder}.")
    height, width = whole_number(row.get("height")) or 0, whole_number(row.get("width")) or 0
    if min(height, width) < 1:
        got = f"{row.get('height')!r:.50} and {row.get('width')!r:.50}"
        raise DataError(f"'height' and 'width' must be whole numbers from 1, got {got}.")
    check_image_size((height, width))
    return ImageRecord(id, folder / name, height, width)


def _row(
    row: dict[str, Any], name: str, image: int, size: tuple[int, int], label_of: dict[int, int], warnings: dict[str, list[str]]
) -> _Row | None:
    """Return a checked annotation; None where it has neither a box nor a mask inside the image."""
    category, crowd, area = whole_number(row.get("category_id")), row.get("iscrowd", 0), row.get("area")
    if category is None or category not in label_of:
        raise DataError(f"there is no category {row.get('category_id')!r:.50}, the file has {_id_range(sorted(label_of))}.")
    if crowd not in (0, 1, "0", "1"):
        raise DataError(f"'iscrowd' must be 0 or 1, got {crowd!r:.50}.")
    if area is not None and _number(area) is None:
        raise DataError(f"'area' must be a finite number, got {area!r:.50}.")
    shape = rle.from_coco(_with_numbers(row.pop("segmentation", None)), size)
    box = _box(row.get("bbox"), size)
    if box is None:
        box = rle.box(_runs(shape, size), size[0])
        if box == (0, 0, 0, 0):
            warnings[_NO_MASK].append(name)
            return None
        if row.get("bbox") is not None:
            warnings[_NO_BOX].append(f"{name}, {row['bbox']!r:.100}")
    elif _contradicts(box, shape, size):
        warnings[_MISMATCHED_BOX].append(f"{name}, {row['bbox']!r:.100}")
    area = _number(area) or 0
    if area <= 0:  # it is missing, or the signed area of a polygon in the opposite direction
        area = rle.area(_runs(shape, size))
    return _Row(image, label_of[category], box, area, bool(int(crowd)), shape)


def _box(box: Any, size: tuple[int, int]) -> tuple[float, float, float, float] | None:
    """Return a `bbox`, clipped to the image, as x0 y0 x1 y1; None if it is missing, empty or not four finite numbers."""
    numbers = [number for value in box if (number := _number(value)) is not None] if isinstance(box, list) else []
    if len(numbers) != 4 or len(box) != 4:
        return None
    x, y, width, height = numbers
    x0, x1 = (float(min(max(value, 0), size[1])) for value in (x, x + width))
    y0, y1 = (float(min(max(value, 0), size[0])) for value in (y, y + height))
    return (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else None


def _contradicts(box: Sequence[float], shape: rle.Counts | rle.Polygons, size: tuple[int, int]) -> bool:
    """Return whether the IoU of a box and the box of its mask is low. Polygons are not rasterized."""
    if isinstance(shape, tuple):
        points = shape[0] if len(shape) == 1 else np.concatenate(shape)
        left, top, right, bottom = *points.min(0).tolist(), *points.max(0).tolist()
    else:
        left, top, right, bottom = rle.box(shape, size[0])
    width, height = min(right, size[1]) - max(left, 0), min(bottom, size[0]) - max(top, 0)
    shared_width, shared_height = min(box[2], right) - max(box[0], left), min(box[3], bottom) - max(box[1], top)
    box_width, box_height = box[2] - box[0], box[3] - box[1]
    if min(width, height, box_width, box_height) < 3:  # for thin boxes, rounding decides
        return False
    shared = max(shared_width, 0) * max(shared_height, 0)
    return shared < _LEAST_IOU * (width * height + box_width * box_height - shared)


def _with_numbers(segmentation: Any) -> Any:
    """Return run lengths with counts and size as numbers, even if they are written as text."""
    if not isinstance(segmentation, dict):
        return segmentation  # NumPy reads polygons that are written as text
    lists = {key: value for key, value in segmentation.items() if isinstance(value, list)}
    return segmentation | {key: [_number(x) if isinstance(x, str) else x for x in value] for key, value in lists.items()}


def _runs(shape: rle.Counts | rle.Polygons, size: tuple[int, int]) -> rle.Counts:
    return rle.from_polygons(shape, size) if isinstance(shape, tuple) else shape


def whole_number(value: Any) -> int | None:
    """Return a whole number, which may be written as text ("7") or as a float (7.0); None for anything else."""
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value) if len(value) < 100 else None
    number = _number(value)
    return int(number) if number is not None and number == number // 1 else None


def _number(value: Any) -> int | float | None:
    """Return a finite number, which may be written as text, as in Roboflow's exports; None for anything else."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if -1e300 < value < 1e300 else None  # also None for NaN


def _id_range(ids: list[int]) -> str:
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
