"""The base of data sets: indexed images with their annotations."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from maskset.instances import Category, Instances


@dataclass(frozen=True)
class ImageRecord:
    """The entry of an image in a data set, without its pixels.

    Attributes:
        id: id in the COCO file.
        file: image file; None for generated images.
        height: height in pixels.
        width: width in pixels.
    """

    id: int
    file: Path | None
    height: int
    width: int


class Dataset(ABC):
    """Annotated images, indexed from 0.

    A subclass calls `super().__init__(categories, images)` and defines `image` and `targets`; the rest is derived.

    Attributes:
        categories: the classes, in the order of the labels and of their COCO ids.
        images: one record per image.
        skip_broken: whether broken images and annotations are left out; otherwise they raise a DataError.
        skipped: one message for each image or annotation that was left out so far.
    """

    def __init__(self, categories: Sequence[Category], images: Sequence[ImageRecord], skip_broken: bool = False) -> None:
        self.categories, self.images, self.skip_broken = tuple(categories), images, skip_broken
        self.skipped: list[str] = []

    @abstractmethod
    def image(self, index: int) -> UInt8[Tensor, "3 h w"]:
        """Return the RGB pixels of an image.

        Raises:
            DataError: the image cannot be read.
        """

    @abstractmethod
    def targets(self, index: int) -> Instances:
        """Return the targets of an image, without crowds. The image file is not read."""

    def read(self, index: int) -> tuple[UInt8[Tensor, "3 h w"], Instances]:
        """Return `image(index)` and `targets(index)`."""
        return self.image(index), self.targets(index)

    def crowds(self, index: int) -> Instances:
        """Return the crowd regions of an image, by default none; evaluation ignores detections inside them."""
        return self.targets(index)[:0]

    def areas(self, index: int) -> Float[Tensor, "T"]:
        """Return the areas of `targets(index)` in pixels, by which COCO's evaluation distinguishes small from large."""
        return self.targets(index).masks.areas().double()

    def counts(self) -> Int[np.ndarray, "images"]:
        """Return the number of targets in each image, without crowds."""
        return np.array([len(self.targets(index)) for index in range(len(self))], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.images)
