"""Backbones, which compute maps at strides (2, 4,) 8, 16 and 32 of an image, and necks, which turn them into levels of one width.

Swin is in `layers/swin.py`; all other backbones come from timm.
"""

import difflib
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from maskset.errors import ConfigError
from maskset.layers.swin import SWIN_SIZES, SwinTransformer

Norm = Literal["frozen", "group", "batch"]
STRIDES = [4, 8, 16, 32]  # of a feature pyramid
_ALL_STRIDES = [2, *STRIDES]


class Backbone(nn.Module):
    """A feature extractor with maps at several strides.

    Args:
        name: see `build_backbone`.
        body: the network, which returns a list of maps.
        channels: of each map, the last of which has a stride of 32.
        channels_last: the body's maps are [B h w C] instead of [B C h w].

    Attributes:
        strides: pixels per cell of each map.
        stride_in_first: whether bottlenecks have their stride in the first convolution, see `maskset.layers.resnet`.
    """

    def __init__(self, name: str, body: nn.Module, channels: list[int], channels_last: bool = False) -> None:
        super().__init__()
        self.name, self.body = name, body
        self.channels, self.strides = channels, _ALL_STRIDES[-len(channels) :]
        self.stride_in_first = False
        self._channels_last = channels_last
        convolutions = (module for module in body.modules() if isinstance(module, nn.Conv2d))
        self._depthwise = any(convolution.groups == convolution.in_channels > 1 for convolution in convolutions)

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B _ _ _"]]:
        """Return one map [B C h w] for each stride, finest first."""
        device = pixels.device.type
        half = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        # In float32 on a CPU, channels-last makes depthwise convolutions about a quarter faster to train. Others gain little from
        # it, and round more. Only the order of the pixels decides: that of the weights makes no measurable difference.
        last = half or (self._depthwise and device == "cpu")
        order = torch.channels_last if last else torch.contiguous_format
        maps = self.body(pixels.contiguous(memory_format=order))
        return [x.permute(0, 3, 1, 2) for x in maps] if self._channels_last else maps


class FrozenBatchNorm(nn.Module):
    """Batch norm as a fixed scale and shift per channel, without learned parameters and the same in training and evaluation.

    Args:
        norm: the batch norm that it replaces.
    """

    weight: Float[Tensor, "C"]
    bias: Float[Tensor, "C"]
    running_mean: Float[Tensor, "C"]
    running_var: Float[Tensor, "C"]

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.eps = norm.eps
        self.activation = _activation(norm)
        # timm starts the last norm of a residual branch at zero, from which a frozen norm could never leave.
        self.register_buffer("weight", torch.ones(norm.num_features))
        self.register_buffer("bias", torch.zeros(norm.num_features))
        self.register_buffer("running_mean", torch.zeros(norm.num_features))
        self.register_buffer("running_var", torch.ones(norm.num_features))

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        """Return (x - mean) / sqrt(variance + eps) * weight + bias, in the type of x."""
        if x.dtype == self.weight.dtype:
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            shift = self.bias - self.running_mean * scale
            # Unlike batch_norm, this keeps no copy of x for the gradient.
            return self.activation(torch.addcmul(shift[:, None, None], x, scale[:, None, None]))
        return self.activation(_FixedAffine.apply(x, self.weight, self.bias, self.running_mean, self.running_var, self.eps))


class _FixedAffine(torch.autograd.Function):
    """A frozen batch norm of a map in half precision, computed in float32 in one pass, without float32 maps in memory."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(weight, variance)
        ctx.eps = eps
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (weight, variance) = outer, ctx.saved_tensors
        scale = weight * (variance + ctx.eps).rsqrt()
        return (gradient * scale[:, None, None]).to(gradient.dtype), None, None, None, None, None


class GroupNorm(nn.GroupNorm):
    """Group norm instead of batch norm, with 16 channels per group, or more if 16 does not divide them.

    With the usual 32 groups, groups in narrow layers would have a single channel (Wu & He, ECCV 2018, compare both).

    Args:
        norm: the batch norm that it replaces; its initial scale is kept.
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(math.gcd(max(1, norm.num_features // 16), norm.num_features), norm.num_features)
        self.load_state_dict({"weight": norm.weight, "bias": norm.bias})
        self.activation = _activation(norm)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:  # type: ignore[override]
        """Return x normalized over the cells and channels of each group."""
        return self.activation(super().forward(x))


class BatchNorm(nn.Module):
    """Batch norm that is trained (Ioffe & Szegedy, ICML 2015), without the counter of batches that PyTorch's has.

    Without it, weights have the names of a `FrozenBatchNorm`, so one can be fine-tuned from the other. With several processes,
    each has the statistics of its own images, and the running statistics of the first process are kept.

    Args:
        norm: the batch norm that it replaces; its initial values are kept.
    """

    weight: Float[Tensor, "C"]
    bias: Float[Tensor, "C"]
    running_mean: Float[Tensor, "C"]
    running_var: Float[Tensor, "C"]

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.eps, self.momentum = norm.eps, norm.momentum or 0.1
        self.activation = _activation(norm)
        self.weight, self.bias = norm.weight, norm.bias
        self.register_buffer("running_mean", norm.running_mean)
        self.register_buffer("running_var", norm.running_var)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        """Return x normalized by its own statistics in training, otherwise by the running ones.

        In a frozen stage these do not change either. The statistics of a single value per channel would give zeros for any x.
        """
        own = self.training and self.weight.requires_grad and x.numel() > x.shape[1]
        statistics = self.running_mean, self.running_var
        return self.activation(F.batch_norm(x, *statistics, self.weight, self.bias, own, self.momentum, self.eps))


_SUBSTITUTES: dict[Norm, Callable[[nn.BatchNorm2d], nn.Module]] = {
    "frozen": FrozenBatchNorm,
    "group": GroupNorm,
    "batch": BatchNorm,
}


def build_backbone(name: str, norm: Norm, frozen_stages: int, drop_path: float, finest: Literal[2, 4, 8] = 8) -> Backbone:
    """Return a backbone with random weights.

    Args:
        name: swin_tiny, swin_small, swin_base, swin_large, or any timm model that gives maps at these strides.
        norm: fixed, replaced by group norm, or trained batch norm; ignored for Swin, which has none.
        frozen_stages: how many of stem, stage 1, stage 2, ... are not trained; ignored for Swin, which is always trained.
        drop_path: maximum probability of skipping a residual branch in Swin; ignored for others.
        finest: stride of the first map; the others have strides up to 32. Swin has none of stride 2.

    Raises:
        ConfigError: there is no such model, it has other maps or stages, or `drop_path` is not a probability.
    """
    if not 0 <= drop_path < 1:
        raise ConfigError(f"drop_path must be in [0, 1), got {drop_path} (--model.backbone.drop-path).")
    strides = _ALL_STRIDES[_ALL_STRIDES.index(finest) :]
    if name in SWIN_SIZES:
        if finest < 4:
            raise ConfigError(
                f"the backbone {name!r} has feature maps at strides {STRIDES}, but the system needs {strides}: use a "
                "convolutional one, such as tf_efficientnet_lite0 (--model.backbone.name)."
            )
        swin = SwinTransformer(SWIN_SIZES[name], drop_path, len(strides))
        return Backbone(name, swin, swin.channels)
    body = _timm_body(name, strides)
    if body.feature_info.reduction() != strides:
        raise ConfigError(
            f"the backbone {name!r} has feature maps at strides {body.feature_info.reduction()}, but the system needs {strides}."
        )
    if body.pretrained_cfg.get("fixed_input_size"):
        raise ConfigError(
            f"the backbone {name!r} is made for images of one size; use a convolutional one or {', '.join(SWIN_SIZES)}."
        )
    _replace_batch_norms(body, _SUBSTITUTES[norm])
    _freeze(name, body, frozen_stages)
    channels_last = str(getattr(body, "output_fmt", "NCHW")).endswith("NHWC")
    return Backbone(name, body, list(body.feature_info.channels()), channels_last)


def check_frozen_layers(name: str, norm: Norm, frozen_stages: int, pretrained: bool) -> None:
    """Check that no layers with random weights are frozen.

    Raises:
        ConfigError: there are such layers.
    """
    if name in SWIN_SIZES:
        return
    if not pretrained and (norm == "frozen" or frozen_stages > 0):
        raise ConfigError(
            f"the backbone {name} would be frozen in part (norm {norm}, frozen_stages {frozen_stages}) with random "
            "weights: use --model.backbone.norm group --model.backbone.frozen-stages 0 (or norm batch), or pretrained weights."
        )
    if norm == "group" and frozen_stages > 0:
        raise ConfigError(
            f"backbone.norm group with frozen_stages {frozen_stages}: no pretrained weights hold group norms, so the frozen "
            "ones would stay untrained: use --model.backbone.frozen-stages 0 or --model.backbone.norm frozen."
        )


def _activation(norm: nn.BatchNorm2d) -> nn.Module:
    """Return the activation that some batch norms of timm include."""
    return getattr(norm, "act", nn.Identity())


def _timm_body(name: str, strides: Sequence[int]) -> Any:
    """Return a network of timm with random weights, which returns as many of its last maps as there are strides."""
    import timm

    if not timm.is_model(name.partition(".")[0]):
        near = difflib.get_close_matches(name, [*SWIN_SIZES, *timm.list_models()], n=3)
        raise ConfigError(f"there is no backbone {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else "."))
    try:
        return timm.create_model(name, features_only=True, out_indices=tuple(range(-len(strides), 0)))
    except IndexError:
        raise ConfigError(
            f"the backbone {name!r} has fewer than {len(strides)} feature maps, but the system needs strides {list(strides)}: "
            "use one that has them, such as tf_efficientnet_lite0 (--model.backbone.name)."
        ) from None
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"the backbone {name!r} cannot be built: {error}") from None


def _replace_batch_norms(module: nn.Module, substitute: Callable[[nn.BatchNorm2d], nn.Module]) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, substitute(child))
        else:
            _replace_batch_norms(child, substitute)


def _freeze(name: str, body: nn.Module, count: int) -> None:
    """Freeze the first `count` of stem, layer1, ..., layer4."""
    stages = 5 if hasattr(body, "layer4") else 0
    if not 0 <= count <= stages:
        allowed = f"0 to {stages}" if stages else "0, since it is not laid out as a ResNet"
        raise ConfigError(f"frozen_stages of the backbone {name!r} can be {allowed}; got {count}.")
    trained = tuple(f"layer{stage}." for stage in range(max(1, count), 5))  # the stem is everything before layer1
    for path, parameter in body.named_parameters():
        if count and not path.startswith(trained):
            parameter.requires_grad_(False)


def group_count(width: int) -> int:
    """Return the number of groups of a group norm: 32, or fewer that divide the channels into groups of at least two.

    A group of one channel on a 1 x 1 map would be a single number, whose normalized value is always 0.
    """
    groups = math.gcd(32, width)
    return groups // 2 if 1 < groups == width else groups


class LevelProjection(nn.Module):
    """Projects each map to the same width with a 1x1 convolution and group norm (Deformable DETR, appendix A.2).

    Extra levels come from 3x3 convolutions of stride 2: the first is computed from the last map of the backbone (not from its
    projection), each further one from the level before.

    Args:
        channels: widths of the backbone's maps.
        width: C, of every level.
        levels: number of levels, at least one. If there are fewer levels than maps, the last maps are used.
        bias: whether the convolutions have a bias (SOLQ has one, systems from mmdetection have none).
    """

    def __init__(self, channels: Sequence[int], width: int, levels: int, bias: bool = True) -> None:
        super().__init__()
        used = list(channels)[-levels:]
        self.skipped = len(channels) - len(used)
        convolutions = [nn.Conv2d(c, width, 1, bias=bias) for c in used]
        for extra in range(levels - len(used)):
            convolutions.append(nn.Conv2d(used[-1] if extra == 0 else width, width, 3, stride=2, padding=1, bias=bias))
        for convolution in convolutions:
            nn.init.xavier_uniform_(convolution.weight)
            if convolution.bias is not None:
                nn.init.zeros_(convolution.bias)
        self.convolutions = nn.ModuleList(convolutions)
        self.norms = nn.ModuleList(nn.GroupNorm(group_count(width), width) for _ in convolutions)

    def forward(self, maps: Sequence[Tensor]) -> list[Float[Tensor, "B C h w"]]:
        """Return the levels, finest first."""
        sources = list(maps)[self.skipped :]
        levels: list[Tensor] = []
        for i, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            if i < len(sources):
                source = sources[i]
            else:
                source = sources[-1] if i == len(sources) else levels[-1]
            levels.append(norm(convolution(source)))
        return levels


class FeaturePyramid(nn.Module):
    """The feature pyramid network (FPN; Lin et al., CVPR 2017, figure 3), which adds coarse maps to finer ones.

    As in Detectron2, convolutions have a bias and no norm, and the coarser map is upsampled by nearest neighbor.

    Args:
        channels: widths of the backbone's maps, each of which has half the height and width of the one before.
        width: C, of every level.
    """

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.output = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in channels)
        for convolution in (*self.lateral, *self.output):
            assert isinstance(convolution, nn.Conv2d)
            assert convolution.bias is not None
            nn.init.kaiming_uniform_(convolution.weight, a=1)
            nn.init.zeros_(convolution.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Float[Tensor, "B C h w"]]:
        """Return one level for each map, finest first. The canvas must be a multiple of the last map's stride."""
        sums: list[Tensor] = []
        for source, lateral in zip(reversed(maps), reversed(self.lateral), strict=True):
            level = lateral(source)
            sums.append(level + F.interpolate(sums[-1], scale_factor=2, mode="nearest") if sums else level)
        return [output(level) for level, output in zip(reversed(sums), self.output, strict=True)]
