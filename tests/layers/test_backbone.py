"""Backbones: the official features, and which parts are trained."""

import copy

import pytest
import torch
from goldens import golden, image, notes, weights
from torch import nn

from maskset.errors import ConfigError
from maskset.layers import backbone as backbones
from maskset.layers.backbone import BatchNorm, FrozenBatchNorm, GroupNorm, build_backbone, check_frozen_layers
from maskset.layers.swin import SwinSize
from maskset.systems.base import BackboneConfig

PREFIX = "backbone.0.body."
TINY_SWIN = SwinSize(16, (2, 2, 2, 2), (1, 2, 4, 8))


@pytest.fixture(scope="module")
def official_resnet():
    """The frozen ResNet-50 filled by the recipe; the official names of its weights are ours."""
    entries = [entry for entry in notes("solq")["state_dict"] if entry[0].startswith(PREFIX)]
    backbone = build_backbone("resnet50.tv_in1k", "frozen", 2, 0.0)
    backbone.body.load_state_dict({name.removeprefix(PREFIX): value for name, value in weights(entries).items()}, strict=True)
    return backbone


@pytest.fixture(scope="module")
def official_maps(official_resnet):
    with torch.no_grad():
        return official_resnet(image("solq-a", 192, 256)[None])


@pytest.mark.parametrize(("index", "name"), [(0, "C3"), (1, "C4"), (2, "C5")])
def test_the_maps_of_the_frozen_resnet_are_the_official_ones(official_maps, index, name):
    found = official_maps[index]
    assert list(found.shape) == golden("solq", f"a.backbone.{name}.shape").tolist()
    for key, value in {
        "mean": found.mean(),
        "std": found.std(correction=0),
        "slice": found[:, :8, :4, :4],
        "chmean": found.mean((2, 3)),
    }.items():
        torch.testing.assert_close(value, golden("solq", f"a.backbone.{name}.{key}"), atol=1e-4, rtol=0)


def test_the_frozen_resnet_trains_the_official_parameters(official_resnet):
    everything = {name: p for name, p in official_resnet.body.named_parameters()}
    frozen = {name for name, p in everything.items() if not p.requires_grad}
    assert frozen == {name for name in everything if name.startswith(("conv1", "layer1"))}
    assert sum(p.numel() for p in everything.values()) == 23_454_912  # all convolutions of ResNet-50
    assert len(everything) - len(frozen) == 42
    assert sum(everything[name].numel() for name in frozen) == 54_193_660 - 53_971_260


def test_training_mode_does_not_move_a_frozen_norm(official_resnet):
    pixels = torch.randn(2, 3, 64, 64)
    before = {name: value.clone() for name, value in official_resnet.body.state_dict().items()}
    with torch.no_grad():
        evaluated, trained = official_resnet.eval()(pixels), official_resnet.train()(pixels)
    for a, b in zip(evaluated, trained, strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(value, before[name]) for name, value in official_resnet.body.state_dict().items())


def test_a_frozen_norm_is_batch_norm_in_evaluation():
    norm = nn.BatchNorm2d(5, eps=1e-3).eval()
    for value in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        value.copy_(torch.rand(5) + 0.5)
    frozen = FrozenBatchNorm(norm)
    frozen.load_state_dict({name: value for name, value in norm.state_dict().items() if name != "num_batches_tracked"})
    x = torch.randn(2, 5, 3, 4)
    torch.testing.assert_close(frozen(x), norm(x))
    assert not list(frozen.parameters())


def test_a_frozen_norm_of_half_precision_computes_in_float32_and_rounds_once():
    frozen = FrozenBatchNorm(nn.BatchNorm2d(4))
    for value in frozen.buffers():
        value.uniform_(0.5, 2)
    x = torch.randn(2, 4, 5, 3).bfloat16().requires_grad_()
    gradient = torch.randn(2, 4, 5, 3).bfloat16()
    exact = x.detach().double().requires_grad_()
    expected = frozen.double()(exact)
    expected.backward(gradient.double())
    found = frozen.float()(x)
    found.backward(gradient)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected.bfloat16(), atol=0, rtol=2**-8)
    torch.testing.assert_close(x.grad, exact.grad.bfloat16(), atol=0, rtol=2**-8)


def test_a_trained_batch_norm_is_pytorchs_in_training_and_in_evaluation():
    torch.manual_seed(0)
    reference = nn.BatchNorm2d(5, eps=1e-3, momentum=0.3)
    nn.init.uniform_(reference.weight)
    norm = BatchNorm(copy.deepcopy(reference))
    for _ in range(3):
        x = torch.randn(2, 5, 3, 4) * 3 + 1
        torch.testing.assert_close(norm(x), reference(x))
    assert norm.state_dict().keys() == FrozenBatchNorm(reference).state_dict().keys()
    assert all(torch.equal(value, reference.state_dict()[name]) for name, value in norm.state_dict().items())
    torch.testing.assert_close(norm.eval()(x), reference.eval()(x))


def test_a_batch_norm_of_a_frozen_stage_keeps_its_statistics():
    backbone = build_backbone("resnet10t", "batch", 2, 0.0).train()
    before = {name: value.clone() for name, value in backbone.body.named_buffers()}
    backbone(torch.randn(2, 3, 64, 64))
    moved = {name.partition(".")[0] for name, value in backbone.body.named_buffers() if not torch.equal(value, before[name])}
    assert moved == {"layer2", "layer3", "layer4"}


def test_a_batch_norm_with_one_value_per_channel_takes_the_running_statistics():
    norm = BatchNorm(nn.BatchNorm2d(4)).train()
    norm.load_state_dict({name: torch.rand(4) + 0.5 for name in norm.state_dict()})
    before, x = {name: value.clone() for name, value in norm.state_dict().items()}, torch.randn(1, 4, 1, 1)
    for small in (x, x[:0]):
        assert torch.equal(norm.train()(small), norm.eval()(small))
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("resnet10t", "group"),
        ("resnet10t", "frozen"),
        ("resnet10t", "batch"),
        ("resnet18", "group"),
        ("regnety_002", "group"),
        ("regnety_002", "frozen"),
        ("tf_efficientnet_lite0", "batch"),
    ],
)
def test_gradients_reach_all_that_is_trained_and_nothing_else(name, norm):
    torch.manual_seed(0)
    backbone = build_backbone(name, norm, 2 if name.startswith("resnet") else 0, 0.0)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
    for module in backbone.modules():
        if isinstance(module, (BatchNorm, GroupNorm)):
            nn.init.ones_(module.weight)  # timm starts the last norm of a branch at 0, which needs one step to open
    maps = backbone(torch.randn(2, 3, 96, 128))
    sum((x * torch.randn_like(x)).sum() for x in maps).backward()
    for path, parameter in backbone.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, path
            assert parameter.grad.isfinite().all(), path
            assert parameter.grad.any(), path
        else:
            assert parameter.grad is None, path


@pytest.mark.parametrize(
    "name", ["resnet10t", "convnext_atto", "mambaout_femto", "mobilenetv3_small_050", "focalnet_tiny_srf", "swin_tiny"]
)
def test_maps_have_the_promised_channels_and_strides(name, monkeypatch):
    monkeypatch.setitem(backbones.SWIN_SIZES, "swin_tiny", TINY_SWIN)
    backbone = build_backbone(name, "group", 0, 0.2)
    maps = backbone.eval()(torch.randn(1, 3, 64, 96))
    assert [tuple(x.shape) for x in maps] == [
        (1, c, 64 // s, 96 // s) for c, s in zip(backbone.channels, backbone.strides, strict=True)
    ]
    assert backbone.strides == [8, 16, 32]
    assert all(parameter.requires_grad for parameter in backbone.parameters())


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto", "regnety_002", "swin_tiny"])
def test_a_map_of_stride_4_comes_before_the_same_others(name, monkeypatch, tmp_path):
    monkeypatch.setitem(backbones.SWIN_SIZES, "swin_tiny", TINY_SWIN)
    pixels = torch.randn(1, 3, 64, 96)
    usual, finer = (build_backbone(name, "group", 0, 0.0, finest).eval() for finest in (8, 4))
    known = usual.state_dict()
    missing, unexpected = finer.load_state_dict(known, strict=False)
    assert not unexpected
    assert all("output_norm" in key for key in missing)  # the new map of a Swin has a norm of its own
    assert finer.strides == [4, 8, 16, 32]
    first, *others = finer(pixels)
    assert first.shape == (1, finer.channels[0], 16, 24)
    assert finer.channels[1:] == usual.channels
    for found, expected in zip(others, usual(pixels), strict=True):
        assert torch.equal(found, expected)


def test_a_backbone_without_a_map_of_stride_4_is_refused_where_one_is_needed():
    with pytest.raises(ConfigError, match=r"strides \[.*\], but the system needs \[4, 8, 16, 32\]"):
        build_backbone("vit_tiny_patch16_224", "frozen", 0, 0.0, finest=4)


@pytest.mark.parametrize(("name", "width"), [("tf_efficientnet_lite0", 16), ("resnet10t", 64)])
def test_a_map_of_stride_2_comes_before_the_same_others(name, width):
    pixels = torch.randn(1, 3, 64, 96)
    usual, finer = (build_backbone(name, "group", 0, 0.0, finest).eval() for finest in (4, 2))
    finer.load_state_dict(usual.state_dict())
    assert finer.strides == [2, 4, 8, 16, 32]
    assert finer.channels == [width, *usual.channels]
    first, *others = finer(pixels)
    assert first.shape == (1, width, 32, 48)
    for found, expected in zip(others, usual(pixels), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("swin_tiny", r"strides \[4, 8, 16, 32\], but the system needs \[2, 4, 8, 16, 32\].*--model.backbone.name"),
        ("convnext_atto", r"fewer than 5 feature maps, but the system needs strides \[2, 4, 8, 16, 32\].*--model.backbone.name"),
    ],
)
def test_a_backbone_without_a_map_of_stride_2_is_refused_where_one_is_needed(name, message):
    with pytest.raises(ConfigError, match=message):
        BackboneConfig(name=name).build(finest=2)


def test_an_odd_size_is_rounded_up():
    maps = build_backbone("resnet10t", "group", 0, 0.0)(torch.randn(1, 3, 65, 97))
    assert [tuple(x.shape[2:]) for x in maps] == [(9, 13), (5, 7), (3, 4)]


@pytest.mark.parametrize("norm", ["frozen", "group", "batch"])
def test_bfloat16_stays_bfloat16_and_near_float32(norm):
    torch.manual_seed(0)
    backbone, pixels = build_backbone("resnet10t", norm, 0, 0.0), torch.randn(1, 3, 64, 64)
    exact = backbone(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = backbone(pixels)
    for a, b in zip(exact, rounded, strict=True):
        assert (a - b).abs().mean() < 0.05 * a.abs().mean()
    assert norm == "group" or rounded[0].dtype == torch.bfloat16  # autocast keeps group norm in float32


def test_memory_layout_makes_no_difference():
    torch.manual_seed(0)
    backbone, pixels = build_backbone("resnet10t", "group", 0, 0.0), torch.randn(1, 3, 64, 64)
    plain = backbone(pixels)
    other = backbone.to(memory_format=torch.channels_last)(pixels.to(memory_format=torch.channels_last))
    for a, b in zip(plain, other, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("frozen_stages", range(6))
def test_frozen_stages_count_the_stem_first(frozen_stages):
    backbone = build_backbone("resnet10t", "frozen", frozen_stages, 0.0)
    stages = ["conv1", "layer1", "layer2", "layer3", "layer4"]
    frozen = {name.partition(".")[0] for name, p in backbone.body.named_parameters() if not p.requires_grad}
    assert frozen == set(stages[:frozen_stages])


@pytest.mark.parametrize(
    ("name", "frozen_stages", "message"),
    [
        ("resnet49", 0, "no backbone 'resnet49'; did you mean resnet"),
        ("hf-hub:timm/resnet18", 0, "no backbone 'hf-hub:timm/resnet18'"),
        ("resnet18.nope", 0, "'resnet18.nope' cannot be built: .*nope"),
        ("swin_tiny_patch4_window7_224", 0, "images of one size.*swin_tiny"),
        ("vit_tiny_patch16_224", 0, r"strides \[16, 16, 16\]"),
        ("resnet18", 6, "can be 0 to 5; got 6"),
        ("resnet18", -1, "can be 0 to 5; got -1"),
        ("convnext_atto", 2, "can be 0, since it is not laid out as a ResNet; got 2"),
    ],
)
def test_a_backbone_that_does_not_do_is_refused(name, frozen_stages, message):
    with pytest.raises(ConfigError, match=message):
        build_backbone(name, "group", frozen_stages, 0.0)


def test_a_drop_path_of_one_is_refused():
    with pytest.raises(ConfigError, match=r"drop_path must be in \[0, 1\), got 1.0"):
        build_backbone("swin_tiny", "frozen", 0, 1.0)


@pytest.mark.parametrize(
    ("name", "norm", "frozen_stages", "pretrained", "message"),
    [
        ("resnet50.tv_in1k", "frozen", 0, False, "--model.backbone.norm group --model.backbone.frozen-stages 0"),
        ("resnet50.tv_in1k", "group", 1, False, "--model.backbone.norm group --model.backbone.frozen-stages 0"),
        ("resnet50.tv_in1k", "group", 1, True, "no pretrained weights hold group norms"),
        ("resnet50.tv_in1k", "batch", 1, False, "or norm batch"),
        ("resnet50.tv_in1k", "batch", 0, False, None),
        ("resnet50.tv_in1k", "batch", 2, True, None),
        ("resnet50.tv_in1k", "frozen", 2, True, None),
        ("resnet50.tv_in1k", "group", 0, False, None),
        ("resnet50.tv_in1k", "group", 0, True, None),
        ("swin_large", "frozen", 2, False, None),
    ],
)
def test_what_would_stay_random_for_ever_is_refused(name, norm, frozen_stages, pretrained, message):
    if message is None:
        check_frozen_layers(name, norm, frozen_stages, pretrained)
    else:
        with pytest.raises(ConfigError, match=message):
            check_frozen_layers(name, norm, frozen_stages, pretrained)


def test_the_order_of_pixels_in_memory_changes_no_bit_of_the_maps():
    backbone = build_backbone("resnet10t", "group", 0, 0.0).eval()
    pixels = torch.randn(2, 3, 64, 96)
    for ours, other in zip(backbone(pixels), backbone(pixels.contiguous(memory_format=torch.channels_last)), strict=True):
        assert torch.equal(ours, other)


@pytest.mark.parametrize(("name", "last"), [("tf_efficientnet_lite0", True), ("resnet10t", False), ("resnext50_32x4d", False)])
def test_a_body_with_depthwise_convolutions_computes_in_channels_last_on_a_cpu(name, last):
    torch.manual_seed(0)
    backbone, pixels = build_backbone(name, "frozen", 0, 0.0).eval(), torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        maps, expected = backbone(pixels), backbone.body(pixels)
    for found, other in zip(maps, expected, strict=True):
        assert found.is_contiguous(memory_format=torch.channels_last) is last
        torch.testing.assert_close(found, other, atol=1e-4, rtol=1e-4)
