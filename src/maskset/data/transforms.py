"""Augmentation of images and targets. Pixels stay uint8, masks stay run lengths or polygons."""

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.nn.functional import interpolate

from maskset import boxes
from maskset.data.settings import DataConfig
from maskset.instances import Instances
from maskset.pictures import MAX_SIDE

Pixels = UInt8[Tensor, "3 h w"]


def augment(
    pixels: Pixels, objects: Instances, config: DataConfig, rng: np.random.Generator
) -> tuple[UInt8[Tensor, "3 new_h new_w"], Instances]:
    """Return an augmented image with its targets.

    "detr" is the policy of DETR's family as SOLQ's code has it: flip; resize; then, in half of the cases each, resize again,
    or resize to one of `crop_short_sides`, crop and resize. "mmdet" is the same without the first resize, as in the code
    of SOIT and ISDA. "flip" stops after the first resize. "lsj" is large-scale jitter (Ghiasi et al., CVPR 2021): flip, scale,
    and crop to a square canvas; the batch pads smaller images. "none" changes nothing.
    """
    if config.augmentation == "none":
        return pixels, objects
    if rng.random() < 0.5:
        pixels, objects = flip(pixels, objects)
    if config.augmentation == "lsj":
        return _jitter(pixels, objects, config, rng)
    if config.augmentation != "mmdet":
        pixels, objects = resize(pixels, objects, int(rng.choice(config.short_sides)), config.long_side)
    if config.augmentation == "flip":
        return pixels, objects
    if rng.random() < 0.5:
        pixels, objects = resize(pixels, objects, int(rng.choice(config.crop_short_sides)))
        height, width = (_crop_side(side, config, rng) for side in pixels.shape[1:])
        pixels, objects = _random_crop(pixels, objects, (height, width), rng)
    return resize(pixels, objects, int(rng.choice(config.short_sides)), config.long_side)


def flip(pixels: Pixels, objects: Instances) -> tuple[Pixels, Instances]:
    """Return the image and its targets mirrored left to right."""
    x0, y0, x1, y1 = objects.boxes.unbind(1)
    width = pixels.shape[2]
    mirrored = torch.stack([width - x1, y0, width - x0, y1], 1)
    return pixels.flip(2), replace(objects, boxes=mirrored, masks=objects.masks.flipped())


def crop(pixels: Pixels, objects: Instances, box: tuple[int, int, int, int]) -> tuple[UInt8[Tensor, "3 new_h new_w"], Instances]:
    """Return the part inside x0 y0 x1 y1 (whole pixels, inside the image).

    Boxes are clipped, and targets with an empty box are dropped. The mask of a remaining target may be empty.
    """
    x0, y0, x1, y1 = box
    shifted = boxes.clip(objects.boxes - objects.boxes.new_tensor([x0, y0, x0, y0]), (y1 - y0, x1 - x0))
    objects = replace(objects, boxes=shifted, masks=objects.masks.cropped(box))
    return pixels[:, y0:y1, x0:x1], objects[boxes.area(shifted) > 0]


def resize(
    pixels: Pixels, objects: Instances, short_side: int, long_side: int | None = None
) -> tuple[UInt8[Tensor, "3 new_h new_w"], Instances]:
    """Return the image and its targets at the size of `fitted_size`; masks are resized by nearest neighbor."""
    return _scale(pixels, objects, fitted_size((pixels.shape[1], pixels.shape[2]), short_side, long_side))


def fit(pixels: Pixels, short_side: int, long_side: int | None = None) -> UInt8[Tensor, "3 new_h new_w"]:
    """Return the image at the size of `fitted_size`."""
    return _scale_pixels(pixels, fitted_size((pixels.shape[1], pixels.shape[2]), short_side, long_side))


def fitted_size(size: tuple[int, int], short_side: int, long_side: int | None = None) -> tuple[int, int]:
    """Return height and width after resizing `size`: the shorter side becomes `short_side`, the aspect ratio stays.

    Where the longer side would exceed `long_side`, the shorter side is reduced so that it does not. As in DETR, rounding may let
    the longer side exceed `long_side` slightly; a limit of 5 % more distorts only images thinner than about 1:100. Without
    `long_side`, the limit is `pictures.MAX_SIDE`.
    """
    short, long = min(size), max(size)
    if long_side is not None and long / short * short_side > long_side:
        short_side = max(1, round(long_side * short / long))
    limit = MAX_SIDE if long_side is None else long_side + long_side // 20
    if short == short_side and long <= limit:
        return size
    new_long = min(int(short_side * long / short), limit)
    return (short_side, new_long) if size[0] <= size[1] else (new_long, short_side)


def _jitter(pixels: Tensor, objects: Instances, config: DataConfig, rng: np.random.Generator) -> tuple[Tensor, Instances]:
    height, width = pixels.shape[1:]
    scale = rng.uniform(*config.jitter_scale) * config.jitter_size / max(height, width)
    pixels, objects = _scale(pixels, objects, (max(1, round(height * scale)), max(1, round(width * scale))))
    side = config.jitter_size
    return _random_crop(pixels, objects, (min(side, pixels.shape[1]), min(side, pixels.shape[2])), rng)


def _crop_side(side: int, config: DataConfig, rng: np.random.Generator) -> int:
    if config.crop_fraction:
        return max(1, int(side * config.crop_fraction + 0.5))
    least, greatest = config.crop_range
    return int(rng.integers(min(least, side), min(greatest, side) + 1))


def _random_crop(pixels: Tensor, objects: Instances, size: tuple[int, int], rng: np.random.Generator) -> tuple[Tensor, Instances]:
    y0, x0 = (int(rng.integers(0, old - new + 1)) for old, new in zip(pixels.shape[1:], size, strict=True))
    return crop(pixels, objects, (x0, y0, x0 + size[1], y0 + size[0]))


def _scale(pixels: Tensor, objects: Instances, size: tuple[int, int]) -> tuple[Tensor, Instances]:
    ratio = boxes.scale_of(size, objects.boxes) / boxes.scale_of(objects.masks.size, objects.boxes)
    return _scale_pixels(pixels, size), replace(objects, boxes=objects.boxes * ratio, masks=objects.masks.scaled(size))


def _scale_pixels(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(pixels.shape[1:]) == size:
        return pixels
    # Channels-last is 3 to 7 times as fast here; the result is Pillow's bilinear (antialiased) within one level.
    rows = pixels.permute(1, 2, 0).contiguous()  # of a plain pixels[None], torch would not see that it is channels-last
    batch = rows[None].permute(0, 3, 1, 2)
    return interpolate(batch, size=size, mode="bilinear", antialias=True)[0]
