"""What every system is: an image batch in, slots out; a loss; results. And the input settings that belong to its weights."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from maskset.config import check_finite, config
from maskset.errors import ConfigError, MasksetError
from maskset.instances import Category, Instances
from maskset.structures import ImageBatch, ModelOutput


@config
class InputConfig:
    """How an image becomes a model's input. Saved with the weights, since they were trained on it."""

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of each channel, where white is 1
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)  # of each channel, where white is 1
    channel_order: Literal["rgb", "bgr"] = "rgb"  # which colour the first channel holds
    divisor: int = 1  # the canvas is padded to a multiple of this, pixels
    short_side: int = 800  # images are resized to this at inference, pixels ...
    long_side: int = 1333  # ... unless the longer side would exceed this, pixels

    def __post_init__(self) -> None:
        check_finite(self, "model.input")
        if min(self.divisor, self.short_side, self.long_side) < 1:
            raise ConfigError("input.divisor, input.short_side and input.long_side must be at least 1.")
        if min(self.std) <= 0:
            raise ConfigError(f"input.std must be positive, got {self.std}.")


def check_canvas(images: ImageBatch, divisor: int) -> None:
    """Refuse a batch that a system cannot take.

    Raises:
        ValueError: its pixels are not normalised, or its canvas is no multiple of `divisor` pixels.
    """
    height, width = images.pixels.shape[2:]
    if not images.pixels.is_floating_point():
        raise MasksetError("the model takes normalised pixels, got uint8: call images.normalised(model.input) first.")
    if height % divisor or width % divisor:
        raise MasksetError(
            f"the canvas must be a multiple of {divisor} pixels, got {height} x {width}: "
            f"use ImageBatch.from_images(images, divisor={divisor})."
        )


class System(nn.Module, ABC):
    """One end-to-end instance segmentation system.

    Attributes:
        config: its settings, a frozen dataclass.
        categories: what its class channels stand for; they come from the data in training, from the weights afterwards.
        input: how images become its input.
    """

    config: Any
    categories: tuple[Category, ...]
    input: InputConfig

    @abstractmethod
    def prepare(self, objects: Iterable[Instances]) -> None:
        """Fit, before training, what must come from the data (a PCA or sparse code); most systems have nothing to fit."""

    @abstractmethod
    def forward(self, images: ImageBatch) -> ModelOutput:
        """Return raw predictions for normalised pixels.

        Raises:
            ValueError: the canvas is no multiple of `input.divisor`.
        """

    @abstractmethod
    def loss(self, output: ModelOutput, images: ImageBatch, objects: Sequence[Instances]) -> dict[str, Tensor]:
        """Return the weighted terms of the loss, in float32 also under autocast; the total is their sum.

        The terms of the last layer are named "class" and so on, those of layer 3 "class/3".
        """

    @abstractmethod
    def postprocess(
        self,
        output: ModelOutput,
        images: ImageBatch,
        sizes: Sequence[tuple[int, int]],
        limit: int = 100,
        threshold: float = 0.0,
    ) -> list[Instances]:
        """Return each image's objects, best first.

        Args:
            output: what `forward` returned.
            images: the batch it was computed from.
            sizes: height and width, in pixels, that each image's masks and boxes shall have.
            limit: how many objects an image may have at the most.
            threshold: least score of an object.
        """
