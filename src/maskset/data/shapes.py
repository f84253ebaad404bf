"""Generated images of overlapping, textured shapes, with the same pixels on every machine. They need no download.

Pixels are computed with +, -, *, /, sqrt and comparisons only, whose results IEEE 754 defines to the last bit, and with random
numbers of NumPy's `RandomState`, which is frozen.
"""

import functools
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int, UInt8
from torch import Tensor

from maskset.data.dataset import Dataset, ImageRecord
from maskset.errors import DataError
from maskset.instances import Category, Instances, Masks

CATEGORIES = (Category("ellipse", 1), Category("rectangle", 2), Category("triangle", 3))
SPLITS = {"train": 2000, "val": 200, "test": 200}  # default number of images

Plane = Float64[np.ndarray, "h w"]


class ShapesDataset(Dataset):
    """Scenes of 1 to 5 overlapping shapes, generated on access.

    The shapes are ellipses, rectangles and triangles in any orientation, textured, on a textured background; neither color nor
    texture depends on the class. A shape hides those behind it, and its mask is the visible part. An image depends only on the
    split, its index, the size and the seed.
    """

    def __init__(self, split: str, count: int | None = None, size: tuple[int, int] = (128, 128), seed: int = 0) -> None:
        """Initialize the data set; images are generated when they are read.

        Args:
            split: "train", "val" or "test".
            count: number of images; None means 2,000 in train and 200 in the others.
            size: height and width in pixels, at least 16.
            seed: seed of the scenes.

        Raises:
            DataError: there is no such split, or the size is too small.
        """
        if split not in SPLITS:
            raise DataError(f"the generated shapes have no split {split!r}, only {', '.join(SPLITS)}.")
        if min(size) < 16:
            raise DataError(f"the generated shapes need 16 or more pixels a side, got {size[1]} x {size[0]}.")
        records = [ImageRecord(i + 1, None, *size) for i in range(SPLITS[split] if count is None else count)]
        super().__init__(CATEGORIES, records)
        self.size, self.seed, self._split = size, seed, list(SPLITS).index(split)

    def image(self, index: int) -> UInt8[Tensor, "3 h w"]:
        """Return the RGB pixels of an image."""
        return torch.from_numpy(self._scene(index).paint())

    def targets(self, index: int) -> Instances:
        """Return the targets of an image."""
        scene = self._scene(index)
        masks = Masks.from_dense(torch.from_numpy(scene.visible))
        labels = torch.tensor([shape.label for shape in scene.shapes], dtype=torch.int64)
        return Instances(labels, masks.boxes(), masks, None, CATEGORIES)

    def counts(self) -> Int[np.ndarray, "images"]:
        """Return the number of targets in each image, without their masks."""
        return np.array([len(self._scene(index).shapes) for index in range(len(self))], dtype=np.int64)

    def _scene(self, index: int) -> "Scene":
        if not 0 <= index < len(self):
            raise IndexError(f"there is no image {index}, only 0 to {len(self) - 1}.")
        return _draw_scene((self.seed % 2**32, self._split, index), self.size)


@functools.lru_cache(maxsize=1)  # pixels and targets of an image are mostly read one after the other
def _draw_scene(seed: tuple[int, ...], size: tuple[int, int]) -> "Scene":
    return Scene(np.random.RandomState(seed), size)


def write(folder: str | Path, counts: Mapping[str, int] = SPLITS, size: tuple[int, int] = (128, 128), seed: int = 0) -> Path:
    """Write generated shapes as a data set in COCO's format (`instances_<split>.json` and `<split>/*.png`) and return its folder.

    Args:
        folder: a new folder. It exists only when everything is written.
        counts: number of images in each split.
        size: height and width in pixels.
        seed: seed of the scenes.

    Raises:
        DataError: the folder exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise DataError(f"{folder} exists already: choose another folder, or delete it.")
    temporary = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    for split, count in counts.items():
        _write_split(temporary, split, ShapesDataset(split, count, size, seed))
    temporary.rename(folder)
    return folder


def _write_split(folder: Path, split: str, dataset: ShapesDataset) -> None:
    from PIL import Image

    (folder / split).mkdir(parents=True)
    images, annotations = [], []
    for index, record in enumerate(dataset.images):
        pixels, objects = dataset.read(index)
        name = f"{record.id:06d}.png"
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / split / name)
        images.append({"id": record.id, "file_name": name, "height": record.height, "width": record.width})
        annotations += objects.to_coco(record.id)
    annotations = [{"id": id, **annotation} for id, annotation in enumerate(annotations, start=1)]
    categories = [{"id": category.coco_id, "name": category.name} for category in CATEGORIES]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / f"instances_{split}.json").write_text(json.dumps(content))


@dataclass(frozen=True)
class Shape:
    """One shape of a scene.

    Attributes:
        label: 0 ellipse, 1 rectangle, 2 triangle.
        window: rows and columns of the image that the shape and its shadow may cover.
        distance: approximate distance of each pixel center in the window to the edge, pixels, negative inside.
        appearance_seed: seed of its colors and texture.
    """

    label: int
    window: tuple[slice, slice]
    distance: Plane
    appearance_seed: int


class Scene:
    """The shapes of an image, placed from front to back and painted from back to front.

    Attributes:
        shapes: the shapes, front first.
        visible: masks of their visible parts.
    """

    def __init__(self, random: np.random.RandomState, size: tuple[int, int]) -> None:
        self._size, self._side, self._appearance_seed = size, float(min(size)), _seed(random)
        self.shapes: list[Shape] = []
        visible, occupied = [], np.zeros(size, dtype=bool)
        number = random.randint(1, 6)
        for _ in range(4 * number):
            if len(self.shapes) == number:
                break
            shape = self._draw_shape(random)
            inside = shape.distance < 0
            exposed = inside & ~occupied[shape.window]
            if exposed.sum() > max(0.4 * inside.sum(), 0.006 * self._side**2):
                self.shapes.append(shape)
                visible.append(np.zeros(size, dtype=bool))
                visible[-1][shape.window] = exposed
                occupied[shape.window] |= inside
        self.visible: Bool[np.ndarray, "T h w"] = np.array(visible, dtype=bool).reshape(-1, *size)

    def paint(self) -> UInt8[np.ndarray, "3 h w"]:
        """Return the RGB pixels."""
        random = np.random.RandomState(self._appearance_seed)
        hues = (random.permutation(12) + random.random_sample()) / 12  # a different hue for the background and each shape
        picture = self._background(random, hues[0])
        for shape, hue in reversed(list(zip(self.shapes, hues[1:], strict=False))):
            self._paint(picture[:, *shape.window], shape, hue)
        return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)

    def _draw_shape(self, random: np.random.RandomState) -> Shape:
        """Return a shape with random class, position, direction, size and proportions."""
        label, (height, width) = int(random.randint(3)), self._size
        center_x, center_y = (0.1 + 0.8 * random.random_sample(2)) * (width, height)
        cos, sin = _direction(random)
        a = (0.11 + 0.17 * random.random_sample()) * self._side
        b = a * (0.55 + 0.45 * random.random_sample())
        skew = 0.6 * (random.random_sample() - 0.5)
        reach = (1, 1.28, 1.7)[label] * a + 0.06 * self._side
        rows = slice(max(0, int(center_y - reach)), min(height, int(center_y + reach) + 1))
        columns = slice(max(0, int(center_x - reach)), min(width, int(center_x + reach) + 1))
        x, y = _centers(columns) - center_x, _centers(rows)[:, None] - center_y
        u, v = x * cos + y * sin, y * cos - x * sin
        distance = (_ellipse(u, v, a, b), _rectangle(u, v, 0.9 * a, 0.9 * b), _triangle(u, v, 1.2 * a, 1.2 * b, skew))[label]
        return Shape(label, (rows, columns), distance, _seed(random))

    def _background(self, random: np.random.RandomState, hue: float) -> Float64[np.ndarray, "3 h w"]:
        value = 0.2 + 0.65 * random.random_sample()
        light, dark = (_rgb(hue + shift, 0.15 + 0.3 * random.random_sample(), value + shift) for shift in (0.08, -0.08))
        large, middle, small = (_noise(random, self._size, cell) for cell in (self._side / 2, self._side / 5, 6.0))
        clouds = (4 * large + 2 * middle + small) / 7
        pattern = _pattern(random, self._size, self._side)
        return _mix(light, dark, clouds) * (1 + 0.1 * (pattern - 0.5))

    def _paint(self, canvas: Float64[np.ndarray, "3 h w"], shape: Shape, hue: float) -> None:
        """Paint a shape and its shadow on the part of the image in its window."""
        random, (rows, _), size = np.random.RandomState(shape.appearance_seed), shape.window, shape.distance.shape
        light = _rgb(hue, 0.55 + 0.4 * random.random_sample(), 0.75 + 0.25 * random.random_sample())
        dark = _rgb(hue + 0.12 * (random.random_sample() - 0.5), 0.6, 0.35 + 0.25 * random.random_sample())
        texture = _pattern(random, size, self._side) * (0.2 + 0.3 * random.random_sample())
        bevel = np.clip(1 + shape.distance / (0.025 * self._side), 0, 1)  # 1 at the edge, 0 from a little inside
        daylight = 1.12 - 0.24 * _centers(rows)[:, None] / self._size[0]
        shade = (1 - 0.4 * bevel) * daylight + 0.06 * (_noise(random, size, 3.0) - 0.5)
        shadow = 1 - 0.45 * np.clip(1 - shape.distance / (0.05 * self._side), 0, 1)
        cover = np.clip(0.5 - shape.distance, 0, 1)
        canvas *= shadow * (1 - cover)
        canvas += _mix(light, dark, texture) * (shade * cover)


def _pattern(random: np.random.RandomState, size: tuple[int, int], side: float) -> Plane:
    """Return a pattern in [0, 1] for an image whose shorter side is `side`: a gradient, stripes, checks, dots or clouds."""
    kind, period = random.randint(5), (0.06 + 0.08 * random.random_sample()) * side
    (cos, sin), x, y = _direction(random), np.arange(size[1]), np.arange(size[0])[:, None]
    along, across = x * cos + y * sin, y * cos - x * sin
    if kind == 0:
        return (along - along.min()) / max(along.max() - along.min(), 1.0)
    if kind == 1:
        return _wave(along, period)
    if kind == 2:
        a, b = _wave(along, period), _wave(across, period)
        return a + b - 2 * a * b
    if kind == 3:
        u, v = along / period - np.floor(along / period) - 0.5, across / period - np.floor(across / period) - 0.5
        return np.clip((0.32 - np.sqrt(u * u + v * v)) * period + 0.5, 0, 1)
    return np.clip(2.2 * _noise(random, size, 1.5 * period) - 0.6, 0, 1)


def _noise(random: np.random.RandomState, size: tuple[int, int], cell: float) -> Plane:
    """Return smooth noise in [0, 1]: random values `cell` pixels apart, blended in between."""
    values = random.random_sample((int(size[0] / cell) + 2, int(size[1] / cell) + 2))
    (row, down), (column, right) = (_cells(np.arange(n), cell) for n in size)
    rows = values[row] + (values[row + 1] - values[row]) * down[:, None]
    steps = np.diff(rows, axis=1)
    return rows[:, column] + steps[:, column] * right


def _seed(random: np.random.RandomState) -> int:
    return int(random.randint(2**31 - 1))


def _centers(pixels: slice) -> np.ndarray:
    return np.arange(pixels.start, pixels.stop) + 0.5


def _direction(random: np.random.RandomState) -> tuple[float, float]:
    """Return cosine and sine of a random angle, without trigonometric functions, which differ between machines."""
    while True:
        x, y = 2 * random.random_sample(2) - 1
        if 0.01 < x * x + y * y <= 1:
            length = np.sqrt(x * x + y * y)
            return x / length, y / length


def _ellipse(u: Plane, v: Plane, a: float, b: float) -> Plane:
    radius = np.sqrt((u / a) * (u / a) + (v / b) * (v / b))
    slope = np.sqrt((u / (a * a)) * (u / (a * a)) + (v / (b * b)) * (v / (b * b)))
    return radius * (radius - 1) / np.maximum(slope, 1e-9)


def _rectangle(u: Plane, v: Plane, a: float, b: float) -> Plane:
    return np.maximum(np.abs(u) - a, np.abs(v) - b)


def _triangle(u: Plane, v: Plane, a: float, b: float, skew: float) -> Plane:
    """Return the distance to a triangle with corners (-a, b), (a, b) and (skew * a, -b)."""
    left, right = (1 + skew) * a, (1 - skew) * a  # extent of the sides along u
    height = 2 * b
    from_left = (-(u + a) * height - (v - b) * left) / np.sqrt(height * height + left * left)
    from_right = ((u - a) * height - (v - b) * right) / np.sqrt(height * height + right * right)
    return np.maximum(v - b, np.maximum(from_left, from_right))


def _wave(along: Plane, period: float) -> Plane:
    """Return stripes: 0 in one half of a period and 1 in the other, with edges one pixel wide."""
    phase = along / period - np.floor(along / period)
    return np.clip((np.abs(2 * phase - 1) - 0.5) * period / 2 + 0.5, 0, 1)


def _cells(positions: np.ndarray, cell: float) -> tuple[np.ndarray, np.ndarray]:
    whole = (positions / cell).astype(np.int64)
    part = positions / cell - whole
    return whole, part * part * (3 - 2 * part)


def _rgb(hue: float, saturation: float, value: float) -> Float64[np.ndarray, "3"]:
    """Return the RGB color of a hue (from 0 to 1), saturation and value."""
    sector = (np.array([5.0, 3.0, 1.0]) + 6 * hue) % 6
    return value - value * saturation * np.clip(np.minimum(sector, 4 - sector), 0, 1)


def _mix(
    first: Float64[np.ndarray, "3"], second: Float64[np.ndarray, "3"], share: Float64[np.ndarray, "h w"]
) -> Float64[np.ndarray, "3 h w"]:
    return first[:, None, None] + (second - first)[:, None, None] * share
