"""Backbones: an image in, maps at strides (4,) 8, 16, 32 out. ResNets and others come from timm, Swin from `layers/swin.py`."""

import difflib
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from maskset.errors import ConfigError
from maskset.layers import detectron2
from maskset.layers.swin import SWIN_SIZES, SwinTransformer, rename_swin

STRIDES = [4, 8, 16, 32]
PRETRAINED_SWIN = {  # which of timm's weights a Swin starts from
    "swin_tiny": "swin_tiny_patch4_window7_224.ms_in1k",
    "swin_small": "swin_small_patch4_window7_224.ms_in1k",
    "swin_base": "swin_base_patch4_window7_224.ms_in22k_ft_in1k",
    "swin_large": "swin_large_patch4_window7_224.ms_in22k_ft_in1k",
}


class Backbone(nn.Module):
    """A network whose features a system reads.

    Args:
        name: what `build_backbone` was asked for.
        body: the network; it returns a list of maps.
        channels: of each map, the last of which has a stride of 32.
        channels_last: the body's maps are [B h w C] instead of [B C h w].

    Attributes:
        strides: pixels per cell of each map.
        stride_in_first: whether bottlenecks have their stride in the first convolution, see `maskset.layers.resnet`.
    """

    def __init__(self, name: str, body: nn.Module, channels: list[int], channels_last: bool = False) -> None:
        super().__init__()
        self.name, self.body = name, body
        self.channels, self.strides = channels, STRIDES[-len(channels) :]
        self.stride_in_first = False
        self._channels_last = channels_last

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B _ _ _"]]:
        """Return one map [B C h w] for each stride, finest first."""
        device = pixels.device.type
        half = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        # In float32, channels-last gains little on a CPU, and convolutions round more.
        order = torch.channels_last if half else torch.contiguous_format
        maps = self.body(pixels.contiguous(memory_format=order))
        return [x.permute(0, 3, 1, 2) for x in maps] if self._channels_last else maps


class FrozenBatchNorm(nn.Module):
    """Batch norm as one fixed scale and shift per channel: nothing is learnt, and training and evaluation do not differ.

    Args:
        norm: the batch norm that this stands for.
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
    """A frozen batch norm of half precision: one pass that computes in float32, where arithmetic would make maps of that."""

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
    """Group norm in the place of a batch norm: groups of 16 channels, or of more where 16 does not divide them.

    The usual 32 groups would leave the narrow first layers of small networks one channel each (Wu & He, ECCV 2018, try both).

    Args:
        norm: the batch norm that this stands for; its initial scale is kept.
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(math.gcd(max(1, norm.num_features // 16), norm.num_features), norm.num_features)
        self.load_state_dict({"weight": norm.weight, "bias": norm.bias})
        self.activation = _activation(norm)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:  # type: ignore[override]
        """Return x normalised over the cells and channels of each group."""
        return self.activation(super().forward(x))


def build_backbone(
    name: str, norm: Literal["frozen", "group"], frozen_stages: int, drop_path: float, finest: Literal[4, 8] = 8
) -> Backbone:
    """Return a backbone with random weights.

    Args:
        name: swin_tiny, swin_small, swin_base, swin_large, or any timm model that gives maps at these strides.
        norm: what takes the place of batch norm; without meaning for a Swin.
        frozen_stages: how many of stem, stage 1, stage 2, ... are not trained; without meaning for a Swin, which is whole.
        drop_path: Swin's greatest probability of skipping a block's branch; without meaning for others.
        finest: stride of the first map; the others are 8, 16 and 32.

    Raises:
        ConfigError: there is no such model, or it has no such maps or stages; or `drop_path` is no probability.
    """
    if not 0 <= drop_path < 1:
        raise ConfigError(f"drop_path must be in [0, 1), got {drop_path} (--model.backbone.drop-path).")
    strides = STRIDES[STRIDES.index(finest) :]
    if name in SWIN_SIZES:
        swin = SwinTransformer(SWIN_SIZES[name], drop_path, len(strides))
        return Backbone(name, swin, swin.channels)
    body = _timm_body(name, len(strides))
    if body.feature_info.reduction() != strides:
        raise ConfigError(f"the backbone {name!r} gives maps at strides {body.feature_info.reduction()}, needed are {strides}.")
    if body.pretrained_cfg.get("fixed_input_size"):
        raise ConfigError(
            f"the backbone {name!r} is made for images of one size; use a convolutional one or {', '.join(SWIN_SIZES)}."
        )
    _replace_batch_norms(body, FrozenBatchNorm if norm == "frozen" else GroupNorm)
    _freeze(name, body, frozen_stages)
    channels_last = str(getattr(body, "output_fmt", "NCHW")).endswith("NHWC")
    return Backbone(name, body, list(body.feature_info.channels()), channels_last)


def check_start(name: str, norm: Literal["frozen", "group"], frozen_stages: int, pretrained: bool) -> None:
    """Refuse to train a backbone of which a part would stay random for ever.

    Raises:
        ConfigError: layers are frozen that no weights are read for.
    """
    if name in SWIN_SIZES:
        return
    if not pretrained and (norm == "frozen" or frozen_stages > 0):
        raise ConfigError(
            f"the backbone {name} would be frozen in part (norm {norm}, frozen_stages {frozen_stages}) with random "
            "weights: use --model.backbone.norm group --model.backbone.frozen-stages 0, or pretrained weights."
        )
    if norm == "group" and frozen_stages > 0:
        raise ConfigError(
            f"backbone.norm group with frozen_stages {frozen_stages}: no pretrained weights hold group norms, so the frozen "
            "ones would stay untrained: use --model.backbone.frozen-stages 0 or --model.backbone.norm frozen."
        )


def load_pretrained(backbone: Backbone, weights: str | None) -> str:
    """Fill the backbone with ImageNet weights and return one line that says what was taken from where.

    Group norms keep their initial values (no weights for them are published), and so do the output norms of a Swin that
    was trained as a classifier, and what moves the samples of deformable convolutions.

    Args:
        backbone: made by `build_backbone`.
        weights: a .safetensors, .pth or .pkl file in the layout of timm, torchvision, detectron2 or the authors of Swin; None
            asks timm's hub.

    Raises:
        ConfigError: the weights cannot be had, or are not those of this backbone; the backbone is unchanged.
    """
    if weights is None and backbone.stride_in_first:
        raise ConfigError(
            f"timm's hub has no weights for the backbone {backbone.name} with strides in the first convolutions of its blocks: "
            "give a file, such as detectron2's ImageNetPretrained/MSRA/R-50.pkl, with --model.backbone.weights FILE, or do "
            "without with --model.backbone.pretrained false."
        )
    source = weights or "timm's hub"
    state = _fetch(backbone.name, len(backbone.strides)) if weights is None else _read(Path(weights))
    if detectron2.is_msra(state) != backbone.stride_in_first and "layer4" in dict(backbone.body.named_children()):
        raise ConfigError(
            f"the weights of {source} and the backbone {backbone.name} have their strides in different convolutions, though "
            "shapes fit: MSRA's weights need --model.backbone.stride-in-first true, all others false."
        )
    if detectron2.is_detectron2(state):
        state = detectron2.rename_resnet(state)
    state = rename_swin(state) if backbone.name in SWIN_SIZES else _flatten_stages(state, backbone.body)
    modules, own = dict(backbone.body.named_modules()), backbone.body.state_dict()
    norms = {path for path, module in modules.items() if isinstance(module, (FrozenBatchNorm, GroupNorm))}
    fresh = {key for key in own if isinstance(modules[key.rpartition(".")[0]], GroupNorm)}
    fresh |= {key for key in own if ("output_norm" in key or ".offset." in key) and key not in state}
    expected = {key: value for key, value in own.items() if key not in fresh}

    wrong = [f"{key} is missing" for key in expected if key not in state]
    for key, value in state.items():
        if key in expected and value.shape != expected[key].shape:
            wrong.append(f"{key} is {list(value.shape)} instead of {list(expected[key].shape)}")
        # The classifier is not needed, but anything else that is left over is of a larger network.
        if key not in own and key.partition(".")[0] in modules and key.rpartition(".")[0] not in norms:
            wrong.append(f"{key} has no place")
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ConfigError(f"the weights of {source} are not those of the backbone {backbone.name}: {'; '.join(wrong[:3])}{more}.")
    backbone.body.load_state_dict({key: state[key] for key in expected}, strict=False)
    kinds = {"sampling offsets" if ".offset." in key else "norms" for key in fresh}
    rest = f"; the {len(fresh)} others belong to {' and '.join(sorted(kinds))}, which start anew" if fresh else ""
    return f"backbone {backbone.name}: took {len(expected)} of {len(own)} tensors from {source}{rest}."


def _activation(norm: nn.BatchNorm2d) -> nn.Module:
    """Return what some of timm's batch norms apply after normalising."""
    return getattr(norm, "act", nn.Identity())


def _timm_body(name: str, maps: int) -> Any:
    """Return timm's network, which gives its last maps, with random weights."""
    import timm

    if not timm.is_model(name.partition(".")[0]):
        near = difflib.get_close_matches(name, [*SWIN_SIZES, *timm.list_models()], n=3)
        raise ConfigError(f"there is no backbone {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else "."))
    try:
        return timm.create_model(name, features_only=True, out_indices=tuple(range(-maps, 0)))
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"the backbone {name!r} cannot be built: {error}") from None


def _replace_batch_norms(module: nn.Module, substitute: Callable[[nn.BatchNorm2d], nn.Module]) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, substitute(child))
        else:
            _replace_batch_norms(child, substitute)


def _freeze(name: str, body: nn.Module, count: int) -> None:
    """Take the first `count` of stem, layer1, ..., layer4 out of training."""
    stages = 5 if hasattr(body, "layer4") else 0
    if not 0 <= count <= stages:
        allowed = f"0 to {stages}" if stages else "0, since it is not laid out as a ResNet"
        raise ConfigError(f"frozen_stages of the backbone {name!r} can be {allowed}; got {count}.")
    trained = tuple(f"layer{stage}." for stage in range(max(1, count), 5))  # the stem is all before layer1
    for path, parameter in body.named_parameters():
        if count and not path.startswith(trained):
            parameter.requires_grad_(False)


def _fetch(name: str, maps: int) -> dict[str, Tensor]:
    import timm
    from huggingface_hub import HfApi, try_to_load_from_cache

    file = "model.safetensors"
    try:
        settings: Any = timm.models.get_pretrained_cfg(PRETRAINED_SWIN.get(name, name))
        repository = settings.hf_hub_id
        if try_to_load_from_cache(repository, file) is None:
            HfApi().file_exists(repository, file)  # fails at once without a network, where a download tries for a minute
        if name in SWIN_SIZES:
            return timm.create_model(PRETRAINED_SWIN[name], pretrained=True).state_dict()
        return timm.create_model(name, pretrained=True, features_only=True, out_indices=tuple(range(-maps, 0))).state_dict()
    except Exception as error:  # no network, no such file, a proxy's answer: each library in between raises its own
        raise ConfigError(
            f"the ImageNet weights of the backbone {name} cannot be fetched from timm's hub ({type(error).__name__}): "
            "give a file with --model.backbone.weights FILE, or do without with --model.backbone.pretrained false."
        ) from None


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    problem = "it holds something else"
    try:
        with warnings.catch_warnings(action="ignore"):  # about pickles that are refused anyhow
            if path.suffix == ".pkl":
                return detectron2.read_pickle(path)
            state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise almost anything at a file that is damaged or is not theirs
        state, problem = None, type(error).__name__
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ConfigError(
            f"{path} cannot be read as weights ({problem}): --model.backbone.weights takes a .safetensors file, a .pth file of "
            "nothing but tensors, or a .pkl file of nothing but arrays."
        )
    return state


def _flatten_stages(state: Mapping[str, Tensor], body: nn.Module) -> dict[str, Tensor]:
    """Return a whole timm model's weights under the names of its feature extractor, where stages.0 is called stages_0."""
    children = dict(body.named_children())
    flat = {name: name.replace(".", "_", 1) for name in state}
    return {flat[name] if flat[name].partition(".")[0] in children else name: value for name, value in state.items()}
