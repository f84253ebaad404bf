"""What models take and return: `ImageBatch`, `SlotPredictions`, `ModelOutput`.

Shape letters, used in every file of the package:

    B  images in a batch          H, W  height and width of the padded batch, pixels
    N  slots per image            h, w  height and width of one image or one feature map
    K  classes                    S     side of a box-local mask, pixels
    T  objects of one image       C     feature channels
    D  numbers that describe one mask (coefficients of a code, weights of a kernel)
    L  decoder layers or feature levels

A *slot* is one place where a system may report an object: a query (SOLQ, SOIT, ISDA), a region of interest (ISTR) or a
cell (SOTR, Sextant).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from maskset.errors import MasksetError
from maskset.instances import Category, Instances, Masks
from maskset.instances.masks import nearest_index
from maskset.tensors import TensorRecord, register

__all__ = ["Category", "ImageBatch", "Instances", "Masks", "ModelOutput", "Normalization", "SlotPredictions"]


@runtime_checkable
class Normalization(Protocol):
    """The input settings that `ImageBatch.normalized` reads; mean and std are on the scale where white is 1."""

    @property
    def mean(self) -> tuple[float, float, float]: ...
    @property
    def std(self) -> tuple[float, float, float]: ...
    @property
    def channel_order(self) -> Literal["rgb", "bgr"]: ...


@dataclass(frozen=True, eq=False)
class ImageBatch(TensorRecord):
    """Images padded at the bottom and the right to a common size.

    Attributes:
        pixels: uint8 RGB from the data loader, or floats from `normalized`; the padding is zero.
        sizes: height and width of each image before padding.
    """

    pixels: Float[Tensor, "B 3 H W"] | UInt8[Tensor, "B 3 H W"]
    sizes: Int[Tensor, "B 2"]

    @classmethod
    def from_images(cls, images: Sequence[Tensor], divisor: int = 1) -> "ImageBatch":
        """Return a batch of images [3 h w], padded with zero to the largest height and width, rounded up to `divisor`.

        The memory format is channels-last, as in image files.

        Raises:
            MasksetError: there are no images.
        """
        if len(images) == 0:
            raise MasksetError("ImageBatch.from_images() needs at least one image, got none.")
        sizes = torch.tensor([tuple(image.shape[-2:]) for image in images]).view(-1, 2)
        height, width = (-(-sizes.amax(0) // divisor) * divisor).tolist()
        pixels = images[0].new_zeros(len(images), height, width, 3).permute(0, 3, 1, 2)
        for canvas, image in zip(pixels, images, strict=True):
            canvas[:, : image.shape[1], : image.shape[2]] = image
        return cls(pixels, sizes)

    def __len__(self) -> int:
        return len(self.pixels)

    def normalized(self, input: Normalization) -> "ImageBatch":
        """Return the model's input: float32 planes of (pixel / 255 - mean) / std, channels in the model's order, padding zero.

        Raises:
            MasksetError: the pixels are not uint8.
        """
        if self.pixels.dtype != torch.uint8:
            raise MasksetError(f"normalized() takes uint8 pixels, got {self.pixels.dtype}: was this batch normalized before?")
        pixels = self.pixels.flip(1) if input.channel_order == "bgr" else self.pixels
        mean = torch.tensor(input.mean, device=pixels.device).view(3, 1, 1)
        std = torch.tensor(input.std, device=pixels.device).view(3, 1, 1)
        planes = pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255).sub_(mean).div_(std)
        return ImageBatch(planes.masked_fill_(self.padding((pixels.shape[2], pixels.shape[3]))[:, None], 0.0), self.sizes)

    def padding(self, size: tuple[int, int]) -> Bool[Tensor, "B h w"]:
        """Return the padding mask, resized to `size` (height, width) by nearest neighbor (as F.interpolate does)."""
        inside = []
        for axis, cells in enumerate(size):
            index = nearest_index(self.pixels.shape[2 + axis], cells).to(self.sizes.device)
            inside.append(index[None] < self.sizes[:, axis, None])
        return ~(inside[0][:, :, None] & inside[1][:, None, :])


@dataclass(eq=False)
class SlotPredictions(TensorRecord):
    """Raw predictions of one decoder layer, stage or head, for all slots.

    Attributes:
        class_logits: one-vs-all, before the sigmoid.
        mask_params: D numbers from which the system computes a mask.
        boxes: cx cy w h, fractions of the unpadded image.
    """

    class_logits: Float[Tensor, "B N K"]
    mask_params: Float[Tensor, "B N D"] | None = None
    boxes: Float[Tensor, "B N 4"] | None = None


@dataclass(eq=False)
class ModelOutput(TensorRecord):
    """Raw predictions of every decoder layer or stage; the last is used at inference.

    Attributes:
        layers: one element for each decoder layer or stage.
        mask_features: the map that mask_params are applied to, where the system has one.
        proposals: predictions of the first stage, where the system has two.
    """

    layers: list[SlotPredictions]
    mask_features: Float[Tensor, "B C h w"] | None = None
    proposals: SlotPredictions | None = None


register(ImageBatch, ["pixels", "sizes"])
register(SlotPredictions, ["class_logits", "mask_params", "boxes"])
register(ModelOutput, ["layers", "mask_features", "proposals"])
