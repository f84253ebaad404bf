"""What every data set is: numbered images with their objects. And the error that bad data end in."""

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
    """What is known of an image before it is read.

    Attributes:
        id: its id in the COCO file.
        file: where its pixels are; None where they are generated.
        height: pixels.
        width: pixels.
    """

    id: int
    file: Path | None
    height: int
    width: int


@runtime_checkable
class Dataset(Protocol):
    """Annotated images, by number from 0.

    Attributes:
        categories: what the labels stand for, in the order of their COCO ids.
        images: one record for each image.
        skip_broken: whether broken images and annotations are left out; otherwise they are errors.
        skipped: what was left out so far, one message each.
    """

    categories: tuple[Category, ...]
    skip_broken: bool
    skipped: list[str]

    @property
    def images(self) -> Sequence[ImageRecord]: ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[UInt8[Tensor, "3 h w"], Instances]:
        """Return the pixels (RGB) and the objects of an image, crowds left out."""
        ...

    def image(self, index: int) -> UInt8[Tensor, "3 h w"]:
        """Return the pixels (RGB) of an image."""
        ...

    def objects(self, index: int) -> Instances:
        """Return the objects of an image, crowds left out, without reading its pixels."""
        ...

    def crowds(self, index: int) -> Instances:
        """Return the regions that hold many objects of a class; evaluation forgives what is found there."""
        ...

    def areas(self, index: int) -> Float[Tensor, "T"]:
        """Return the annotated area of each of `objects(index)`, pixels: COCO's evaluation tells small from large by it."""
        ...

    def counts(self) -> Int[np.ndarray, "images"]:
        """Return how many objects each image has, crowds left out."""
        ...
