"""The things that travel between modules: a batch, masks, instances, slots, an output.

Shape letters, used in every file of the package:

    B  images in a batch          H, W  height and width of the padded batch, pixels
    N  slots per image            h, w  height and width of one image or one feature map
    K  classes                    S     side of a box-local mask, pixels
    T  objects of one image       C     feature channels
    D  numbers that describe one mask (a code's coefficients, a kernel's weights)
    L  decoder layers or feature levels

A *slot* is one place where a system may report an object: a query (SOLQ, SOIT, ISDA), a region of interest (ISTR) or a
grid cell (SOTR).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.utils import _pytree as pytree

from maskset import rle
from maskset.native.runs import View, view
from maskset.rle import Counts, Index, Polygons

Device = torch.device | str
Same = TypeVar("Same", bound="_Tensors")  # not typing.Self: the shape checker of the tests does not know it in methods


@dataclass(frozen=True)
class Category:
    """What a class channel stands for: its name, and the id that COCO files of the data use for it."""

    name: str
    coco_id: int


@runtime_checkable
class Normalisation(Protocol):
    """The part of a model's input settings that `ImageBatch.normalised` reads; all of it on the scale where white is 1."""

    @property
    def mean(self) -> tuple[float, float, float]: ...
    @property
    def std(self) -> tuple[float, float, float]: ...
    @property
    def channel_order(self) -> Literal["rgb", "bgr"]: ...


class _Tensors:
    """`.to` and `.pin_memory` for a dataclass of tensors, and of lists of such dataclasses."""

    def to(self: Same, device: Device, non_blocking: bool = False) -> Same:
        """Return a copy on the device."""
        return self._each(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self: Same) -> Same:
        """Return a copy in page-locked memory, from which copies to a GPU need not wait."""
        return self._each(lambda value: value.pin_memory())

    def _each(self: Same, change) -> Same:
        def walk(value):
            if isinstance(value, list):
                return [walk(one) for one in value]
            return change(value) if isinstance(value, (Tensor, _Tensors, Masks)) else value

        return type(self)(**{field.name: walk(getattr(self, field.name)) for field in fields(self)})  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class ImageBatch(_Tensors):
    """Images padded at the bottom and the right to one size.

    Attributes:
        pixels: uint8 RGB as the loader gives them, or what `normalised` made of them, with padding zero.
        sizes: height and width of each image before padding.
    """

    pixels: Float[Tensor, "B 3 H W"] | UInt8[Tensor, "B 3 H W"]
    sizes: Int[Tensor, "B 2"]

    @classmethod
    def from_images(cls, images: Sequence[Tensor], divisor: int = 1) -> "ImageBatch":
        """Return a batch of images [3 h w], padded with zero to the largest height and width, rounded up to `divisor`.

        In memory the colours of a pixel stay together, as image files have them.
        """
        sizes = torch.tensor([tuple(image.shape[-2:]) for image in images]).view(-1, 2)
        height, width = (-(-sizes.amax(0) // divisor) * divisor).tolist()
        pixels = images[0].new_zeros(len(images), height, width, 3).permute(0, 3, 1, 2)
        for canvas, image in zip(pixels, images, strict=True):
            canvas[:, : image.shape[1], : image.shape[2]] = image
        return cls(pixels, sizes)

    def __len__(self) -> int:
        return len(self.pixels)

    def normalised(self, input: Normalisation) -> "ImageBatch":
        """Return the batch as a model wants it: float32, (pixel / 255 - mean) / std, planes of channels in the model's order."""
        if self.pixels.dtype != torch.uint8:
            raise ValueError(f"normalised() takes uint8 pixels, got {self.pixels.dtype}: has this batch been normalised before?")
        pixels = self.pixels.flip(1) if input.channel_order == "bgr" else self.pixels
        mean = torch.tensor(input.mean, device=pixels.device).view(3, 1, 1)
        std = torch.tensor(input.std, device=pixels.device).view(3, 1, 1)
        planes = pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255).sub_(mean).div_(std)
        return ImageBatch(planes.masked_fill_(self.padding((pixels.shape[2], pixels.shape[3]))[:, None], 0.0), self.sizes)

    def padding(self, size: tuple[int, int]) -> Bool[Tensor, "B h w"]:
        """Return where a map of `size` (height, width) over the canvas lies on padding: the nearest pixel, torch's rule."""
        inside = []
        for axis, cells in enumerate(size):
            index = rle.nearest_index(self.pixels.shape[2 + axis], cells).to(self.sizes.device)
            inside.append(index[None] < self.sizes[:, axis, None])
        return ~(inside[0][:, :, None] & inside[1][:, None, :])


class Masks:
    """The masks of one image, each kept as it came: polygons or run lengths. Dense ones are made only on request.

    What augmentation does (flip, crop, nearest scaling) moves whole rows and columns, so it is kept as two index maps from
    this view to the image that the masks were drawn on, and costs nothing until the pixels are asked for.

    Attributes:
        size: height and width of the view, pixels.
    """

    def __init__(
        self,
        shapes: Sequence[Counts | Polygons],
        source_size: tuple[int, int],
        rows: Int[Tensor, "h"] | None = None,
        columns: Int[Tensor, "w"] | None = None,
    ) -> None:
        self._shapes = tuple(shapes)
        self._source_size = source_size
        self._rows, self._columns = rows, columns  # None: every row or column, in order

    @classmethod
    def from_dense(cls, masks: Bool[Tensor, "T h w"]) -> "Masks":
        """Return masks kept as run lengths."""
        return cls(rle.encode(masks), (masks.shape[1], masks.shape[2]))

    @classmethod
    def from_polygons(cls, polygons: Sequence[Sequence[np.ndarray]], size: tuple[int, int]) -> "Masks":
        """Return one mask per element, each the union of polygons [n 2] (x, y in pixels), in an image of `size`.

        Raises:
            maskset.rle.MaskError: a polygon is not finite, far outside of the image, or has fewer than three points.
        """
        parts = [tuple(np.asarray(part, dtype=np.float64).reshape(-1, 2) for part in one) for one in polygons]
        return cls([rle.check_polygons(one, size) for one in parts], size)

    @classmethod
    def from_rle(cls, counts: Sequence[Counts | Sequence[int] | str | bytes], size: tuple[int, int]) -> "Masks":
        """Return masks from COCO run lengths (lists of counts, or compressed text) for an image of `size` (height, width).

        Raises:
            maskset.rle.MaskError: the run lengths do not sum to height * width.
        """
        shapes = []
        for one in counts:
            if isinstance(one, (str, bytes)):
                one = rle.from_string(one)
            shapes.append(rle.check(one if isinstance(one, Tensor) else rle.from_list(one), size))
        return cls(shapes, size)

    @classmethod
    def cat(cls, parts: Sequence["Masks"]) -> "Masks":
        """Return the masks of several lists over the same image as one list, in order."""
        if len({part.size for part in parts}) != 1:
            raise ValueError(f"masks of different sizes cannot be joined: {sorted({part.size for part in parts})}.")
        whole = [part if part._is_source else cls(part.rle(), part.size) for part in parts]
        return cls([shape for part in whole for shape in part._shapes], parts[0].size)

    @property
    def size(self) -> tuple[int, int]:
        height, width = self._source_size
        return (
            height if self._rows is None else len(self._rows),
            width if self._columns is None else len(self._columns),
        )

    @property
    def device(self) -> torch.device:
        tensors = [shape for shape in self._shapes if isinstance(shape, Tensor)]
        return tensors[0].device if tensors else torch.device("cpu")

    def __len__(self) -> int:
        return len(self._shapes)

    def __iter__(self) -> Iterator["Masks"]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int | Index | Sequence[int]) -> "Masks":
        """Return the masks chosen by a position, a slice, positions or a boolean of each; always a `Masks`."""
        return self._view([self._shapes[i] for i in _positions(index, len(self))])

    def __eq__(self, other: object) -> bool:
        """Return whether both show the same pixels, however they are kept."""
        if not isinstance(other, Masks):
            return NotImplemented
        if self.size != other.size or len(self) != len(other):
            return False
        ours, theirs = (rle.viewed(one.rle(), one.size, None, None) for one in (self, other))  # without runs of no pixels
        return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(ours, theirs, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Masks({len(self)} of {self.size[0]} x {self.size[1]} pixels)"

    def flipped(self) -> "Masks":
        """Return the masks mirrored left to right."""
        return self._view(self._shapes, self._rows, self._all_columns().flip(0))

    def cropped(self, box: tuple[int, int, int, int]) -> "Masks":
        """Return the part inside x0 y0 x1 y1 (whole pixels, inside of the image)."""
        x0, y0, x1, y1 = box
        return self._view(self._shapes, self._all_rows()[y0:y1], self._all_columns()[x0:x1])

    def scaled(self, size: tuple[int, int]) -> "Masks":
        """Return the masks resized to `size` (height, width) by nearest neighbour."""
        rows, columns = self._all_rows(), self._all_columns()
        rows = rows[rle.nearest_index(len(rows), size[0]).to(rows.device)]
        columns = columns[rle.nearest_index(len(columns), size[1]).to(columns.device)]
        return self._view(self._shapes, rows, columns)

    def dense(self) -> Bool[Tensor, "T h w"]:
        """Return the pixels, on the device where the run lengths are (polygons: on the CPU)."""
        return rle.decode(self._source_runs(), self._source_size, self._rows, self._columns)

    def rle(self) -> list[Counts]:
        """Return the run lengths of each mask (see `maskset.rle`)."""
        runs = self._source_runs()
        return runs if self._is_source else rle.viewed(runs, self._source_size, self._rows, self._columns)

    def view(self) -> View:
        """Return what the C library reads; the masks must be on the CPU."""
        return view(self._source_runs(), self._source_size, self._rows, self._columns)

    def areas(self) -> Int[Tensor, "T"]:
        """Return the number of pixels of each mask."""
        return rle.areas(self.rle()).cpu()

    def boxes(self) -> Float[Tensor, "T 4"]:
        """Return the tight box of each mask, x0 y0 x1 y1 in pixels, x1 and y1 exclusive; zeros for an empty mask."""
        return rle.boxes(self.rle(), self.size[0])

    def polygons(self) -> list[list[np.ndarray]]:
        """Return the outlines of each mask, [n 2] of x and y in pixels: as they came, or traced along the pixels' edges.

        A traced outline goes around each connected part (4-neighbours); holes are filled, as COCO's polygons have none.
        """
        if self._is_source and all(not isinstance(shape, Tensor) for shape in self._shapes):
            return [list(shape) for shape in self._shapes]  # type: ignore[arg-type]
        return [rle.outlines(counts, self.size) for counts in self.rle()]

    def to(self, device: Device, non_blocking: bool = False) -> "Masks":
        """Return the masks on a device. Polygons are rasterised first: a device other than the CPU knows only run lengths."""
        device = torch.device(device)
        if device == self.device and (device.type == "cpu" or all(isinstance(shape, Tensor) for shape in self._shapes)):
            return self
        return self._with_runs(lambda flat: flat.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Masks":
        """Return the masks with their run lengths in page-locked memory."""
        return self._with_runs(lambda flat: flat.pin_memory())

    def _with_runs(self, change) -> "Masks":
        runs = self._source_runs()
        if not runs:
            return self
        lengths = [len(counts) for counts in runs]
        return self._view(change(torch.cat(runs)).split(lengths), self._rows, self._columns)

    def _source_runs(self) -> list[Counts]:
        polygons = {id(shape): shape for shape in self._shapes if not isinstance(shape, Tensor)}  # each is drawn once
        drawn = rle.rasterised(list(polygons.values()), self._source_size) if polygons else []
        device, runs = self.device, dict(zip(polygons, drawn, strict=True))
        return [shape if isinstance(shape, Tensor) else runs[id(shape)].to(device) for shape in self._shapes]

    @property
    def _is_source(self) -> bool:
        return self._rows is None and self._columns is None

    def _all_rows(self) -> Int[Tensor, "h"]:
        return torch.arange(self._source_size[0]) if self._rows is None else self._rows

    def _all_columns(self) -> Int[Tensor, "w"]:
        return torch.arange(self._source_size[1]) if self._columns is None else self._columns

    def _view(self, shapes, *maps) -> "Masks":
        rows, columns = maps if maps else (self._rows, self._columns)
        return Masks(shapes, self._source_size, rows, columns)


@dataclass(frozen=True, eq=False)
class Instances(_Tensors):
    """The objects of one image, annotated (`scores` is None) or found.

    Attributes:
        labels: class of each object, an index into `categories`.
        boxes: x0 y0 x1 y1, pixels of the image.
        masks: at the size of the image.
        scores: confidence in [0, 1], or None for annotations.
        categories: what the classes are.
    """

    labels: Int[Tensor, "T"]
    boxes: Float[Tensor, "T 4"]
    masks: Masks
    scores: Float[Tensor, "T"] | None = None
    categories: tuple[Category, ...] = ()

    def __post_init__(self) -> None:
        lengths = {"labels": len(self.labels), "boxes": len(self.boxes), "masks": len(self.masks)}
        if self.scores is not None:
            lengths["scores"] = len(self.scores)
        if len(set(lengths.values())) > 1:
            raise ValueError(f"Instances needs equally many of everything, got {lengths}.")

    @classmethod
    def empty(cls, size: tuple[int, int], categories: tuple[Category, ...] = ()) -> "Instances":
        """Return no objects, of an image of `size` (height, width)."""
        return cls(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), Masks([], size), None, categories)

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator["Instances"]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int | Index | Sequence[int]) -> "Instances":
        """Return the objects chosen: `found[found.scores > 0.5]`, `found[:10]`, `found[0]` (one object, still a list)."""
        kept = torch.tensor(_positions(index, len(self)), dtype=torch.int64, device=self.labels.device)
        scores = None if self.scores is None else self.scores[kept]
        return replace(self, labels=self.labels[kept], boxes=self.boxes[kept], masks=self.masks[kept.tolist()], scores=scores)

    def __repr__(self) -> str:
        counts: dict[str, int] = {}
        for name in self.names:
            counts[name] = counts.get(name, 0) + 1
        listed = ", ".join(f"{count} {name}" for name, count in counts.items())
        return f"Instances({len(self)} in {self.masks.size[0]} x {self.masks.size[1]} pixels{': ' if listed else ''}{listed})"

    @property
    def names(self) -> list[str]:
        """The class name of each object."""
        return [self.categories[label].name if self.categories else f"class {label}" for label in self.labels.tolist()]

    def to_coco(self, image_id: int = 0) -> list[dict[str, Any]]:
        """Return COCO annotations (or results, where there are scores): boxes x y w h, masks as compressed run lengths."""
        size, runs = self.masks.size, self.masks.rle()
        areas, texts, rows = rle.areas(runs).tolist(), rle.to_strings(runs, size), []
        for i, (label, (x0, y0, x1, y1)) in enumerate(zip(self.labels.tolist(), self.boxes.tolist(), strict=True)):
            row: dict[str, Any] = {
                "image_id": image_id,
                "category_id": self.categories[label].coco_id if self.categories else label,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": areas[i],
                "iscrowd": 0,
                "segmentation": {"size": list(size), "counts": texts[i]},
            }
            if self.scores is not None:
                row["score"] = float(self.scores[i])
            rows.append(row)
        return rows

    def to_polygons(self) -> list[list[np.ndarray]]:
        """Return the outlines of each object, see `Masks.polygons`."""
        return self.masks.polygons()

    def to_supervision(self) -> Any:
        """Return `supervision.Detections`; needs the extra `viz`."""
        try:
            import supervision
        except ImportError as error:
            raise ImportError("to_supervision() needs the package supervision: pip install 'maskset[viz]'.") from error
        return supervision.Detections(
            xyxy=self.boxes.cpu().numpy().reshape(-1, 4),
            mask=self.masks.dense().cpu().numpy(),
            confidence=None if self.scores is None else self.scores.cpu().numpy(),
            class_id=self.labels.cpu().numpy(),
            data={"class_name": np.array(self.names, dtype=object).astype(str)},
        )

    def draw(self, image: Any) -> Any:
        """Return the image with masks, boxes, names and scores drawn on it, in colours that colour-blind people can tell."""
        from maskset.inference.draw import draw

        return draw(image, self)

    def save(self, path: str | Path, image: Any = None) -> Path:
        """Write the objects and return the path; its ending chooses what.

        Args:
            path: `.json` COCO annotations or results; `.png` label image (0 background, then 1, 2, ... in order, 16 bit), or
                with `image` (also `.jpg`) the image with the objects drawn.
            image: what to draw on.
        """
        from maskset.inference.results import save

        return save(self, Path(path), image)


@dataclass(eq=False)
class SlotPredictions(_Tensors):
    """What one layer, stage or head says about every slot.

    Attributes:
        class_logits: one-vs-all, before the sigmoid.
        mask_params: D numbers that the system turns into a mask.
        boxes: cx cy w h, fractions of the unpadded image.
        mask_context: features beside each code (ISTR-SMT).
    """

    class_logits: Float[Tensor, "B N K"]
    mask_params: Float[Tensor, "B N D"] | None = None
    boxes: Float[Tensor, "B N 4"] | None = None
    mask_context: Float[Tensor, "B N c s s"] | None = None


@dataclass(eq=False)
class ModelOutput(_Tensors):
    """What a system's forward returns: every layer's or stage's predictions, raw; the last one answers.

    Attributes:
        layers: one element per decoder layer or stage.
        mask_features: the map that mask_params work on, where the system has one.
        proposals: what a first stage says, where the system has two.
    """

    layers: list[SlotPredictions]
    mask_features: Float[Tensor, "B C h w"] | None = None
    proposals: SlotPredictions | None = None


def _positions(index: int | Index | Sequence[int], length: int) -> list[int]:
    """Return what an index chooses of `length` things as a list of positions."""
    if isinstance(index, slice):
        return list(range(length))[index]
    chosen = torch.as_tensor(index).cpu()
    if chosen.dtype == torch.bool:
        if chosen.shape != (length,):
            raise IndexError(f"a boolean index needs one element for each of the {length} objects, got {tuple(chosen.shape)}.")
        return chosen.nonzero()[:, 0].tolist()
    everything = list(range(length))
    return [everything[int(i)] for i in chosen.reshape(-1).tolist()]


def _register(cls: type, names: Sequence[str]) -> None:
    pytree.register_pytree_node(
        cls,
        lambda value: ([getattr(value, name) for name in names], [(k, v) for k, v in vars(value).items() if k not in names]),
        lambda children, rest: _rebuild(cls, dict(zip(names, children, strict=True)) | dict(rest)),  # type: ignore[arg-type]
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
    )


def _rebuild(cls: type, values: dict[str, Any]) -> Any:
    made = object.__new__(cls)
    for name, value in values.items():
        object.__setattr__(made, name, value)
    return made


_register(ImageBatch, ["pixels", "sizes"])
_register(Masks, ["_shapes", "_rows", "_columns"])
_register(Instances, ["labels", "boxes", "masks", "scores"])
_register(SlotPredictions, ["class_logits", "mask_params", "boxes", "mask_context"])
_register(ModelOutput, ["layers", "mask_features", "proposals"])
