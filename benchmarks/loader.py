"""Images for training, read, augmented and with the masks that a loss reads, against Pillow with dense masks; one core.

Generated JPEGs of 640 x 480 pixels with 6 polygons each on average, resized to 1066 x 800. maskset makes uint8 pixels and the
128 x 128 box crops that SOLQ's loss compares; normalizing is the device's. The other way resizes with Pillow, normalizes float
pixels, draws every polygon at 640 x 480 and resizes the mask to 1066 x 800, as the loaders of DETR's family do.
"""

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor

from benchmarks.measure import in_turn
from benchmarks.report import Report
from maskset.data import open_data
from maskset.data.dataset import Dataset
from maskset.data.transforms import fitted_size, resize
from maskset.instances import Instances
from maskset.masks.targets import crop
from maskset.systems.base import InputConfig

SHORT_SIDE, LONG_SIDE, CROP = 800, 1333, 128
BASELINE = "Pillow, float pixels, dense masks"
Polygon = list[float]


def run(report: Report, quick: bool) -> None:
    """Measure both on the same files."""
    count, size = (2, (120, 160)) if quick else (16, (480, 640))
    with tempfile.TemporaryDirectory() as folder:
        polygons = write(Path(folder), count, size)
        data = open_data(folder, "train")
        agree(report, data, polygons)
        implementations = {BASELINE: partial(theirs, data, polygons), "maskset": partial(ours, data)}
        case = f"{count} images of {size[1]} x {size[0]} pixels, {sum(map(len, polygons))} objects"
        report.compare(case, BASELINE, in_turn(implementations, 0 if quick else 30))
    for implementation in implementations:
        found = report.figure(case, implementation)
        if found and found.milliseconds:
            report.note(f"{implementation}: {1000 * count / found.milliseconds:.0f} images/s and core.")
    report.target("speed-up of the loader over Pillow and dense masks, per core", 4, report.speedup(case, "maskset"))


def ours(data: Dataset) -> None:
    """Read all images, with the masks that SOLQ's loss needs."""
    for index in range(len(data)):
        _, found = resized(data, index)
        crop(found.masks, found.boxes, CROP)


def resized(data: Dataset, index: int) -> tuple[UInt8[Tensor, "3 h w"], Instances]:
    """Return an augmented image, without random flips, so that both implementations have the same input."""
    return resize(*data.read(index), SHORT_SIDE, LONG_SIDE)


def theirs(data: Dataset, polygons: list[list[Polygon]]) -> None:
    """Read all images and their masks."""
    for index in range(len(data)):
        usual(data, polygons, index)


def usual(data: Dataset, polygons: list[list[Polygon]], index: int) -> tuple[Float[Tensor, "3 h w"], Float[Tensor, "T h w"]]:
    """Return the normalized pixels of an image and its dense masks."""
    record, settings = data.images[index], InputConfig()
    size = fitted_size((record.height, record.width), SHORT_SIDE, LONG_SIDE)
    assert record.file is not None
    with Image.open(record.file) as picture:
        picture = picture.convert("RGB").resize((size[1], size[0]), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    pixels = (pixels - torch.tensor(settings.mean).view(3, 1, 1)) / torch.tensor(settings.std).view(3, 1, 1)
    coco: Any = coco_mask
    drawn = [coco.decode(coco.frPyObjects([polygon], record.height, record.width)) for polygon in polygons[index]]
    masks = torch.from_numpy(np.concatenate(drawn, 2)).permute(2, 0, 1).float()
    return pixels, F.interpolate(masks[:, None], size=size, mode="nearest")[:, 0]


def agree(report: Report, data: Dataset, polygons: list[list[Polygon]]) -> None:
    """Check pixels and masks of the first image."""
    pixels, found = resized(data, 0)
    settings = InputConfig()
    normalized, masks = usual(data, polygons, 0)
    levels = (normalized * torch.tensor(settings.std).view(3, 1, 1) + torch.tensor(settings.mean).view(3, 1, 1)) * 255
    report.agree("pixels of a resized image, levels of 255", (levels - pixels).abs().max().item(), 1.01)
    dense: Bool[Tensor, "T h w"] = masks > 0.5
    report.agree("pixels of resized masks that differ", int((found.masks.dense() != dense).sum()), 0)


def write(folder: Path, count: int, size: tuple[int, int]) -> list[list[Polygon]]:
    """Write JPEGs with polygons as COCO annotations, and return the polygons of each image."""
    rng = np.random.default_rng(0)
    (folder / "annotations").mkdir()
    (folder / "train").mkdir()
    images, annotations, polygons = [], [], []
    for index in range(count):
        name = f"{index:06d}.jpg"
        Image.fromarray(clouds(rng, size)).save(folder / "train" / name, quality=90)
        images.append({"id": index, "file_name": name, "height": size[0], "width": size[1]})
        polygons.append([star(rng, size) for _ in range(5 + index % 3)])
        annotations += [annotation(polygon, index) for polygon in polygons[-1]]
    numbered = [{"id": number, **row} for number, row in enumerate(annotations, 1)]
    content = {"images": images, "annotations": numbered, "categories": [{"id": 1, "name": "star"}]}
    (folder / "annotations" / "instances_train.json").write_text(json.dumps(content))
    return polygons


def clouds(rng: np.random.Generator, size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """Return an image with details of all sizes, whose JPEG is as large as that of a photo."""
    pixels = torch.from_numpy(rng.normal(128, 16, (1, 3, *size)))
    for cells in (60, 20, 8, 3):
        detail = torch.from_numpy(rng.normal(0, cells, (1, 3, 480 // cells, 640 // cells)))
        pixels = pixels + F.interpolate(detail, size, mode="bilinear")
    return pixels[0].clamp(0, 255).byte().permute(1, 2, 0).numpy()


def annotation(polygon: Polygon, image: int) -> dict[str, Any]:
    """Return a polygon as a row of a COCO file."""
    points = np.reshape(polygon, (-1, 2))
    (x0, y0), (width, height) = points.min(0).tolist(), np.ptp(points, 0).tolist()
    known = {"image_id": image, "category_id": 1, "iscrowd": 0, "area": width * height}
    return {**known, "bbox": [x0, y0, width, height], "segmentation": [polygon]}


def star(rng: np.random.Generator, size: tuple[int, int]) -> Polygon:
    """Return x and y of a polygon of 12 to 40 points around a place in the image."""
    points = int(rng.integers(12, 41))
    angle = np.sort(rng.uniform(0, 2 * np.pi, points))
    radius = rng.lognormal(-2.2, 0.6) * min(size) * rng.uniform(0.7, 1.3, points)
    center = rng.uniform(0.15, 0.85, 2) * size[::-1]
    outline = center + radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    return np.clip(outline, 0, np.array(size[::-1]) - 1).ravel().tolist()
