"""Weights of detectron2: names, and .pkl files that are read without running them."""

import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import Tensor

from maskset.conversion.backbones import load_pretrained
from maskset.conversion.detectron2 import read_pickle
from maskset.errors import ConfigError
from maskset.layers.backbone import build_backbone
from maskset.layers.resnet import DeformableConvolution, deform, stride_in_first


def resnet50():
    torch.manual_seed(0)
    return build_backbone("resnet50.tv_in1k", "frozen", 0, 0.0, finest=4)


def official_name(name: str) -> str:
    """Return what detectron2 calls an entry of ours."""
    stage, _, rest = name.partition(".")
    if not stage.startswith("layer"):
        return "stem." + name.replace("bn1", "conv1.norm")
    rest = rest.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    return f"res{int(stage[-1]) + 1}." + rest.replace("bn1", "conv1.norm").replace("bn2", "conv2.norm").replace(
        "bn3", "conv3.norm"
    )


def caffe2_name(name: str) -> str:
    """Return what MSRA's file calls an entry of detectron2's."""
    if name.startswith("stem."):
        return {"stem.conv1.weight": "conv1_w", "stem.conv1.norm.weight": "res_conv1_bn_s"}.get(name, "res_conv1_bn_b")
    stage, block, part, *kind = name.split(".")
    branch = {"shortcut": "branch1", "conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c"}[part]
    return f"{stage}_{block}_{branch}_" + {"weight": "w", "norm.weight": "bn_s", "norm.bias": "bn_b"}[".".join(kind)]


def filled(backbone) -> dict[str, Tensor]:
    """Return weights for the backbone under its own names."""
    generator = torch.Generator().manual_seed(1)
    return {name: torch.rand(value.shape, generator=generator) for name, value in backbone.body.state_dict().items()}


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_a_pickle_of_detectron2_fills_a_resnet(tmp_path, protocol):
    backbone = resnet50()
    weights = filled(backbone)
    arrays = OrderedDict((official_name(name), value.numpy()) for name, value in weights.items())
    content = {"model": arrays | {"fc.weight": np.zeros((2, 3))}, "__author__": "torchvision", "matching_heuristics": True}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(content, protocol))
    assert "loaded 265 of 265 tensors" in load_pretrained(backbone, str(tmp_path / "R-50.pkl"))
    assert all(torch.equal(value, weights[name]) for name, value in backbone.body.state_dict().items())


def test_msras_norms_are_a_scale_and_a_shift(tmp_path):
    backbone = resnet50()
    stride_in_first(backbone)
    weights = filled(backbone)
    arrays = {
        caffe2_name(official_name(name)): value.numpy()
        for name, value in weights.items()
        if not name.split(".")[-1].startswith("run")
    }
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps({"blobs": arrays | {"pred_w": np.zeros((2, 3))}}, 2))
    with pytest.raises(ConfigError, match="strides in different convolutions"):
        load_pretrained(resnet50(), str(tmp_path / "R-50.pkl"))
    trained = build_backbone("resnet50.tv_in1k", "batch", 0, 0.0)
    stride_in_first(trained)
    with pytest.raises(ConfigError, match=r"have no statistics.*--model\.backbone\.norm frozen"):
        load_pretrained(trained, str(tmp_path / "R-50.pkl"))
    load_pretrained(backbone, str(tmp_path / "R-50.pkl"))
    norm = backbone.body.get_submodule("layer2.0.bn2")
    x = torch.randn(1, 128, 2, 2)
    scale, shift = (weights[f"layer2.0.bn2.{part}"][:, None, None] for part in ("weight", "bias"))
    torch.testing.assert_close(norm(x), x * scale + shift)


def test_weights_for_the_other_place_of_the_stride_are_refused(tmp_path):
    torch.save(resnet50().body.state_dict(), tmp_path / "resnet50.pth")
    backbone = resnet50()
    stride_in_first(backbone)
    with pytest.raises(ConfigError, match="strides in different convolutions, though shapes fit"):
        load_pretrained(backbone, str(tmp_path / "resnet50.pth"))


class Bomb:
    """What a hostile pickle does when it is read."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was executed')",))


@pytest.mark.parametrize("content", [pickle.dumps({"model": Bomb()}), pickle.dumps([1, 2]), b"no pickle", b"", pickle.dumps({})])
def test_a_pickle_of_anything_else_is_refused_and_never_run(tmp_path, content):
    (tmp_path / "R-50.pkl").write_bytes(content)
    with pytest.raises(ConfigError, match=r"R-50\.pkl"):
        load_pretrained(resnet50(), str(tmp_path / "R-50.pkl"))


def test_the_error_names_an_object_in_a_pickle_that_is_not_an_array(tmp_path):
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(pickle.UnpicklingError, match=r"it names builtins\.exec, which is not an array"):
        read_pickle(tmp_path / "R-50.pkl")


def test_a_stride_in_the_first_convolution_leaves_the_sizes_and_changes_the_values():
    torch_style, caffe_style = resnet50().eval(), resnet50().eval()
    stride_in_first(caffe_style)
    assert [block.conv1.stride for block in caffe_style.body.layer2] == [(2, 2), (1, 1), (1, 1), (1, 1)]
    assert {block.conv2.stride for block in caffe_style.body.layer2} == {(1, 1)}
    pixels = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        a, b = torch_style(pixels), caffe_style(pixels)
    assert [x.shape for x in a] == [x.shape for x in b]
    assert torch.equal(a[0], b[0])  # the first stage has no stride
    assert not torch.allclose(a[1], b[1])
    with pytest.raises(ConfigError, match="MSRA/R-50.pkl"):
        load_pretrained(caffe_style, None)


def test_a_deformable_convolution_without_offsets_is_half_of_the_plain_one():
    plain, deformable = resnet50().eval(), resnet50().eval()
    deform(deformable, stages=2)
    kinds = [
        [isinstance(block.conv2, DeformableConvolution) for block in layer] for layer in list(deformable.body.children())[-4:]
    ]
    assert [all(kind) for kind in kinds] == [any(kind) for kind in kinds] == [False, False, True, True]
    for stage in ("layer3.0", "layer3.1"):  # with and without a stride
        convolution, other = plain.body.get_submodule(stage).conv2, deformable.body.get_submodule(stage).conv2
        x = torch.randn(2, convolution.in_channels, 7, 10)
        torch.testing.assert_close(other(x), 0.5 * convolution(x), atol=1e-5, rtol=1e-5)


def test_plain_weights_fill_a_resnet_with_deformable_convolutions(tmp_path):
    plain, deformable = resnet50(), resnet50()
    deform(deformable, stages=3)
    weights = filled(plain)
    torch.save(weights, tmp_path / "resnet50.pth")
    said = load_pretrained(deformable, str(tmp_path / "resnet50.pth"))
    assert said.endswith(
        "loaded 265 of 291 tensors from "
        + str(tmp_path / "resnet50.pth")
        + "; the other 26, sampling offsets, keep their initial values."
    )
    own = deformable.body.state_dict()
    assert all(torch.equal(own[name], value) for name, value in weights.items())
    assert not own["layer4.0.conv2.offset.weight"].any()


@pytest.mark.parametrize("change", [stride_in_first, deform])
def test_a_resnet_without_bottlenecks_is_refused(change):
    with pytest.raises(ConfigError, match="the backbone 'resnet10t' has no bottlenecks"):
        change(build_backbone("resnet10t", "group", 0, 0.0, finest=4))


def test_the_offsets_of_a_deformable_convolution_move_its_samples():
    convolution = torch.nn.Conv2d(2, 3, 3, padding=1, bias=False)
    deformable = DeformableConvolution(convolution)
    with torch.no_grad():
        deformable.offset.bias[:18:2] = 1.0  # y of every sample: one cell down
    x = torch.randn(1, 2, 6, 5)
    torch.testing.assert_close(deformable(x)[:, :, :-2], 0.5 * convolution(x)[:, :, 1:-1])
    with torch.autocast("cpu", torch.bfloat16):
        assert deformable(x).dtype == torch.float32
