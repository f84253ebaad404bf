"""The settings of training data: augmentation, grouping into batches, and reading."""

from typing import Annotated, Literal

from maskset.config import Bounds, PositiveInt, Probability, check_bounds, config, setting
from maskset.errors import ConfigError

Augmentation = Literal["detr", "mmdet", "flip", "lsj", "none"]


@config
class DataConfig:
    """The settings of augmentation, batches and reading."""

    augmentation: Augmentation = setting(
        "detr",
        "detr: flip, resize, crop; mmdet: detr without the first resize; flip: no crop; lsj: scale jitter; none: unchanged",
    )
    short_sides: tuple[PositiveInt, ...] = setting(
        tuple(range(480, 801, 32)), "detr, mmdet, flip: shorter sides to draw from, pixels"
    )
    long_side: PositiveInt = setting(1333, "detr, mmdet, flip: maximum longer side, pixels")
    crop_short_sides: tuple[PositiveInt, ...] = setting(
        (400, 500, 600), "detr, mmdet: shorter sides before a crop (half of the images), pixels"
    )
    crop_range: tuple[PositiveInt, PositiveInt] = setting((384, 600), "detr, mmdet: minimum and maximum side of the crop, pixels")
    crop_fraction: Probability = setting(
        0.0, "detr, mmdet: side of the crop as a fraction of the image; replaces crop_range if above 0"
    )
    jitter_size: PositiveInt = setting(1024, "lsj: side of the square canvas, pixels")
    jitter_scale: tuple[float, float] = setting((0.1, 2.0), "lsj: minimum and maximum scale relative to the canvas")
    group_by_aspect: bool = setting(True, "group wide and tall images into separate batches, to save padding")
    workers: Annotated[int, Bounds(0, 1024)] = setting(2, "processes that read images; results do not depend on it")
    skip_broken: bool = setting(False, "leave out (and count) broken images and annotations instead of stopping")

    def __post_init__(self) -> None:
        check_bounds(self, "data")
        if not self.short_sides:
            raise ConfigError("data.short_sides needs one or more sizes.")
        if self.augmentation in ("detr", "mmdet") and not self.crop_short_sides:
            raise ConfigError(f"data.crop_short_sides needs one or more sizes with augmentation {self.augmentation}.")
        if not 0 < self.jitter_scale[0] <= self.jitter_scale[1]:
            raise ConfigError(f"data.jitter_scale must be (low, high) with 0 < low <= high, got {self.jitter_scale}.")
        if self.crop_range[0] > self.crop_range[1]:
            raise ConfigError(f"data.crop_range must be (low, high) with low <= high, got {self.crop_range}.")
