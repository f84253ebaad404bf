"""The masks of one image, stored as run lengths or polygons."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from maskset import rle
from maskset.errors import MaskError
from maskset.kernels.runs import View, view
from maskset.rle import Counts, Index, Polygons
from maskset.tensors import TensorRecord, register


class Masks(TensorRecord):
    """The masks of one image as polygons or run lengths; `dense()` computes pixels.

    Flips, crops and nearest-neighbor scaling select whole rows and columns. They are stored as two index maps to the rows and
    columns of the original image, so that pixels are computed only once, at the end.

    Attributes:
        size: height and width after all flips, crops and scaling, pixels.
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
        """Return the masks as run lengths.

        Raises:
            MaskError: `masks` is not boolean, for example a label map.
        """
        if masks.dtype != torch.bool or masks.ndim != 3:
            raise MaskError(f"from_dense() takes boolean masks [T h w], got {masks.dtype} {list(masks.shape)}.")
        return cls(rle.encode(masks), (masks.shape[1], masks.shape[2]))

    @classmethod
    def from_polygons(cls, polygons: Sequence[Sequence[np.ndarray]], size: tuple[int, int]) -> "Masks":
        """Return one mask per element, each the union of polygons [n 2] (x, y in pixels), in an image of `size`.

        Raises:
            MaskError: a polygon is not finite, far outside of the image, or has fewer than three points.
        """
        shapes = [tuple(np.asarray(part, dtype=np.float64).reshape(-1, 2) for part in parts) for parts in polygons]
        return cls([rle.check_polygons(shape, size) for shape in shapes], size)

    @classmethod
    def from_rle(cls, counts: Sequence[Counts | Sequence[int] | str | bytes], size: tuple[int, int]) -> "Masks":
        """Return masks from COCO run lengths (lists of counts, or compressed text) for an image of `size` (height, width).

        Raises:
            MaskError: the run lengths do not sum to height * width.
        """
        shapes = []
        for runs in counts:
            if isinstance(runs, (str, bytes)):
                runs = rle.from_string(runs)
            shapes.append(rle.check(runs if isinstance(runs, Tensor) else rle.from_list(runs), size))
        return cls(shapes, size)

    @classmethod
    def cat(cls, parts: Sequence["Masks"]) -> "Masks":
        """Return the masks of several lists over the same image as one list, in order.

        Raises:
            MaskError: the masks differ in size, or there are no lists.
        """
        if len({part.size for part in parts}) != 1:
            raise MaskError(f"masks of different sizes cannot be joined: {sorted({part.size for part in parts})}.")
        sources = [part if part._is_source else cls(part.rle(), part.size) for part in parts]
        return cls([shape for part in sources for shape in part._shapes], parts[0].size)

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
        """Return the masks that an index, a slice, a list of indices or a boolean for each mask selects; always a `Masks`."""
        return self._replace([self._shapes[i] for i in positions(index, len(self))])

    def __eq__(self, other: object) -> bool:
        """Return whether both have the same pixels, as polygons or run lengths."""
        if not isinstance(other, Masks):
            return NotImplemented
        if self.size != other.size or len(self) != len(other):
            return False
        ours, theirs = (rle.select(masks.rle(), masks.size, None, None) for masks in (self, other))  # without runs of length 0
        return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(ours, theirs, strict=True))

    def __repr__(self) -> str:
        return f"Masks({len(self)} of {self.size[0]} x {self.size[1]} pixels)"

    def flipped(self) -> "Masks":
        """Return the masks mirrored left to right."""
        return self._replace(self._shapes, self._rows, self._all_columns().flip(0))

    def cropped(self, box: tuple[int, int, int, int]) -> "Masks":
        """Return the part inside the box x0 y0 x1 y1 (whole pixels; x1 and y1 exclusive).

        Raises:
            MaskError: the box is not inside the image.
        """
        x0, y0, x1, y1 = box
        height, width = self.size
        if not (0 <= x0 <= x1 <= width and 0 <= y0 <= y1 <= height):
            raise MaskError(f"a crop must lie inside the image, {width} x {height} pixels, got x0 y0 x1 y1 = {box}.")
        return self._replace(self._shapes, self._all_rows()[y0:y1], self._all_columns()[x0:x1])

    def scaled(self, size: tuple[int, int]) -> "Masks":
        """Return the masks resized to `size` (height, width) by nearest neighbor."""
        rows, columns = self._all_rows(), self._all_columns()
        rows = rows[nearest_index(len(rows), size[0]).to(rows.device)]
        columns = columns[nearest_index(len(columns), size[1]).to(columns.device)]
        return self._replace(self._shapes, rows, columns)

    def dense(self) -> Bool[Tensor, "T h w"]:
        """Return the pixels, on the device of the run lengths (polygons: on the CPU)."""
        return rle.decode(self._source_runs(), self._source_size, self._rows, self._columns)

    def rle(self) -> list[Counts]:
        """Return the run lengths of each mask (see `maskset.rle`)."""
        runs = self._source_runs()
        return runs if self._is_source else rle.select(runs, self._source_size, self._rows, self._columns)

    def to_c_view(self) -> View:
        """Return the view that the C library reads; the masks must be on the CPU."""
        return view(self._source_runs(), self._source_size, self._rows, self._columns)

    def areas(self) -> Int[Tensor, "T"]:
        """Return the number of pixels of each mask."""
        return rle.areas(self.rle()).cpu()

    def boxes(self) -> Float[Tensor, "T 4"]:
        """Return the tight box of each mask, x0 y0 x1 y1 in pixels, x1 and y1 exclusive; zeros for an empty mask."""
        return rle.boxes(self.rle(), self.size[0])

    def polygons(self) -> list[list[np.ndarray]]:
        """Return the outlines of each mask, [n 2] of x and y in pixels.

        These are the original polygons where there are any. Otherwise outlines are traced along pixel edges around each
        connected part (4-neighbors); holes are filled, since COCO's polygons have none.
        """
        if self._is_source and all(not isinstance(shape, Tensor) for shape in self._shapes):
            return [list(shape) for shape in self._shapes]  # type: ignore[arg-type]
        return [rle.outlines(counts, self.size) for counts in self.rle()]

    def _to(self, device: torch.device, non_blocking: bool) -> "Masks":
        """Return the masks on a device. Polygons are rasterized first, since they exist on the CPU only."""
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
        return self._replace(change(torch.cat(runs)).split(lengths), self._rows, self._columns)

    def _source_runs(self) -> list[Counts]:
        polygons = {id(shape): shape for shape in self._shapes if not isinstance(shape, Tensor)}  # each is rasterized once
        drawn = rle.rasterize(list(polygons.values()), self._source_size) if polygons else []
        device, runs = self.device, dict(zip(polygons, drawn, strict=True))
        return [shape if isinstance(shape, Tensor) else runs[id(shape)].to(device) for shape in self._shapes]

    @property
    def _is_source(self) -> bool:
        return self._rows is None and self._columns is None

    def _all_rows(self) -> Int[Tensor, "h"]:
        return torch.arange(self._source_size[0]) if self._rows is None else self._rows

    def _all_columns(self) -> Int[Tensor, "w"]:
        return torch.arange(self._source_size[1]) if self._columns is None else self._columns

    def _replace(self, shapes, *maps) -> "Masks":
        rows, columns = maps if maps else (self._rows, self._columns)
        return Masks(shapes, self._source_size, rows, columns)


def nearest_index(length: int, new: int) -> Int64[Tensor, "new"]:
    """Return the source index of each of `new` cells when `length` cells are resized by nearest neighbor (torch's rule)."""
    cells: Float[Tensor, "1 1 length"] = torch.arange(length, dtype=torch.float32)[None, None]
    return torch.nn.functional.interpolate(cells, size=new, mode="nearest")[0, 0].long()


def positions(index: Any, length: int) -> list[int]:
    """Return the positions that an index selects of `length` objects.

    Raises:
        IndexError: the index is out of range, is not of whole numbers or booleans, or has more than one dimension.
    """
    if isinstance(index, slice):
        return list(range(length))[index]
    try:
        selected = torch.as_tensor(index).cpu()
        if selected.layout != torch.strided:
            raise TypeError("a sparse tensor")
    except (TypeError, ValueError, RuntimeError):  # not numbers, or too large ones
        raise IndexError(f"an index must be whole numbers, booleans or a slice, got {index!r:.50}.") from None
    if selected.dtype == torch.bool:
        if selected.shape != (length,):
            raise IndexError(f"a boolean index needs one element for each of the {length} objects, got {tuple(selected.shape)}.")
        return selected.nonzero()[:, 0].tolist()
    if selected.ndim > 1 or (selected.numel() and (selected.is_floating_point() or selected.is_complex())):
        raise IndexError(
            f"an index must be whole numbers or booleans of one dimension, got {selected.dtype} {list(selected.shape)}."
        )
    indices = selected.reshape(-1).tolist()
    for i in indices:
        if not -length <= i < length:
            raise IndexError(f"index {i} is out of range: there are {length} objects, numbered from 0.")
    return [i % length for i in indices]


register(Masks, ["_shapes", "_rows", "_columns"])
