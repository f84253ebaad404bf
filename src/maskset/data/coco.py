"""Data sets in COCO's format: a JSON file of annotations and a folder of images."""

import logging
import os
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from maskset.data.annotations import read_annotations, read_categories, read_image_records, read_json, whole_number
from maskset.data.dataset import Dataset, ImageRecord
from maskset.errors import DataError
from maskset.instances import Instances, Masks
from maskset.pictures import read_image

__all__ = ["CocoDataset", "DataError", "ImageRecord"]

_LOG = logging.getLogger("maskset")
_NEXT_STEP = "Correct the data, or leave out broken parts with --skip-broken (in training: --data.skip-broken true)."


class CocoDataset(Dataset):
    """Annotated images of a COCO file.

    The JSON file is checked when the data set is opened; an image, and its size, when it is read. Labels are positions in
    `categories`, which are sorted by id: ids may have gaps, and 0 is a valid id. A box is the annotation's `bbox` clipped to the
    image, or the box of the mask if `bbox` is missing, empty or invalid. Masks are stored as polygons or run lengths.

    Attributes:
        file: the JSON file.
        notes: one warning for each kind of doubtful annotation, such as boxes that contradict their masks. They are also logged
            by the logger "maskset".
    """

    def __init__(self, annotations: str | Path, images: str | Path, skip_broken: bool = False) -> None:
        """Read and check the JSON file.

        Args:
            annotations: the JSON file.
            images: the folder that its file names are relative to.
            skip_broken: leave out broken images and annotations and list them in `skipped`, instead of raising an error.

        Raises:
            DataError: the file is not in COCO's format, or an entry is broken and `skip_broken` is False.
        """
        self.file, problems = Path(annotations), list[str]()
        content = read_json(self.file)
        categories = read_categories(content["categories"], self.file)
        super().__init__(categories, read_image_records(content["images"], Path(images), problems), skip_broken)
        known = {id for row in content["images"] if (id := whole_number(row.get("id"))) is not None} if problems else set()
        self._annotations, notes = read_annotations(content["annotations"], self.images, known, self.categories, problems)
        self.notes: list[str] = [f"{self.file}: {note}" for note in notes]
        self.skipped += [f"{self.file}: {problem}" for problem in problems]
        if problems and not skip_broken:
            more = f" It has {len(problems)} such problems." if len(problems) > 1 else ""
            raise DataError(f"{self.skipped[0]}{more} {_NEXT_STEP}")
        if not self.images:
            raise DataError(f"{self.file} has no usable image. {' '.join(self.skipped[:1])}".rstrip())
        for note in self.notes if os.environ.get("RANK", "0") == "0" else ():  # only the first of several processes
            _LOG.warning("warning: %s", note)

    def __repr__(self) -> str:
        return f"CocoDataset({self.file}: {len(self)} images, {int(self.counts().sum())} objects, {len(self.categories)} classes)"

    def image(self, index: int) -> UInt8[Tensor, "3 h w"]:
        """Return the RGB pixels of an image.

        Raises:
            DataError: the image file is damaged, or its size is not the one in the JSON.
        """
        record = self.images[index]
        assert record.file is not None
        try:
            return read_image(record.file, (record.height, record.width))
        except DataError as error:
            if self.skip_broken:
                raise
            raise DataError(f"{str(error).rstrip('.')}. {_NEXT_STEP}") from error

    def targets(self, index: int) -> Instances:
        """Return the targets of an image, without crowds. The image file is not read."""
        return self._instances(index, crowd=False)

    def crowds(self, index: int) -> Instances:
        """Return the crowd regions of an image; evaluation ignores detections inside them."""
        return self._instances(index, crowd=True)

    def areas(self, index: int) -> Float[Tensor, "T"]:
        """Return the areas of `targets(index)` as annotated, pixels."""
        return torch.from_numpy(self._annotations.areas[self._rows(index, crowd=False)])

    def counts(self) -> Int[np.ndarray, "images"]:
        """Return the number of targets in each image, without building them."""
        before = np.concatenate([[0], np.cumsum(~self._annotations.crowd)])
        return np.diff(before[self._annotations.starts])

    def _rows(self, index: int, crowd: bool) -> Int[np.ndarray, "T"]:
        first, last = self._annotations.starts[index : index + 2]
        return first + np.flatnonzero(self._annotations.crowd[first:last] == crowd)

    def _instances(self, index: int, crowd: bool) -> Instances:
        rows, record = self._rows(index, crowd), self.images[index]
        return Instances(
            labels=torch.from_numpy(self._annotations.labels[rows]),
            boxes=torch.from_numpy(self._annotations.boxes[rows]),
            masks=Masks([self._annotations.shape(row) for row in rows.tolist()], (record.height, record.width)),
            categories=self.categories,
        )
