"""The `Dataset` protocol: indexed images with their annotations."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

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


@runtime_checkable
class Dataset(Protocol):
    """Annotated images, indexed from 0.

    Attributes:
        categories: the classes, in the order of the labels and of their COCO ids.
        images: one record per image.
        skip_broken: whether broken images and annotations are left out; otherwise they raise a DataError.
        skipped: one message for each image or annotation that was left out so far.
    """

    categories: tuple[Category, ...]
    skip_broken: bool
    skipped: list[str]

    @property
    def images(self) -> Sequence[ImageRecord]: ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[UInt8[Tensor, "3 h w"], Instances]:
        """Return the RGB pixels of an image and its targets, without crowds."""
        ...

    def image(self, index: int) -> UInt8[Tensor, "3 h w"]:
        """Return the RGB pixels of an image."""
        ...

    def targets(self, index: int) -> Instances:
        """Return the targets of an image, without crowds. The image file is not read."""
        ...

    def crowds(self, index: int) -> Instances:
        """Return the crowd regions of an image; evaluation ignores detections inside them."""
        ...

    def areas(self, index: int) -> Float[Tensor, "T"]:
        """Return the annotated areas of `targets(index)` in pixels, by which COCO's evaluation distinguishes small from large."""
        ...

    def counts(self) -> Int[np.ndarray, "images"]:
        """Return the number of targets in each image, without crowds."""
        ...
