"""Weights of mmdetection's plain Deformable DETR; their layout is ISDA's without what ISDA adds, and with box branches."""

from dataclasses import replace

import pytest
import torch
from goldens import notes, weights

import maskset
from maskset.checkpoint import read_metadata
from maskset.cli import main
from maskset.conversion import read_state_dict
from maskset.conversion.class_names import NAMES
from maskset.conversion.deformable_detr import initialize
from maskset.errors import ConversionError
from maskset.systems.base import BackboneConfig
from maskset.systems.isda import IsdaConfig
from maskset.systems.solq import SolqConfig
from maskset.systems.sotr import SotrConfig

ADDED = ("neck.first_conv", "mask_feat_head", "bbox_head.kernel_branches")  # by ISDA
BOX_BRANCH = {"0": (256, 256), "2": (256, 256), "4": (4, 256)}


def official() -> dict[str, torch.Tensor]:
    """Return a state dict of mmdetection's layout, with the six copies of the class branch equal."""
    entries = [entry for entry in notes("isda")["state_dict"] if not entry[0].startswith(ADDED)]
    for layer in range(6):
        for part, shape in BOX_BRANCH.items():
            name = f"bbox_head.reg_branches.{layer}.{part}"
            entries += [(f"{name}.weight", shape), (f"{name}.bias", shape[:1])]
    state = weights(entries)
    for kind in ("weight", "bias"):
        for layer in range(6):
            state[f"bbox_head.cls_branches.{layer}.{kind}"] = state[f"bbox_head.cls_branches.0.{kind}"]
    return state


def test_the_layout_has_as_many_entries_as_the_published_file():
    assert len(official()) == 610


def test_isda_takes_everything_but_the_boxes():
    state = official()
    made = initialize(IsdaConfig(), state)
    new = {name.split(".")[0] for name in made.initial}
    assert new == {"project_finest", "mask_feature_head", "kernel_head"}
    assert len(made.initial) == 33  # of 63 official entries, of which 36 are six copies of a branch of 6
    assert all(name.startswith("bbox_head.reg_branches.") for name in made.unused)
    assert len(made.unused) == 36
    ours = made.model.state_dict()
    assert set(made.copied) | set(made.initial) == set(ours)
    assert torch.equal(ours["class_head.weight"], state["bbox_head.cls_branches.0.weight"])
    assert torch.equal(ours["query_position"], state["bbox_head.query_embedding.weight"][:, :256])
    assert torch.equal(ours["query_content"], state["bbox_head.query_embedding.weight"][:, 256:])
    assert torch.equal(ours["project.convolutions.3.weight"], state["neck.extra_convs.0.conv.weight"])
    assert torch.equal(ours["backbone.body.layer1.0.conv1.weight"], state["backbone.layer1.0.conv1.weight"])
    assert [category.coco_id for category in made.model.categories] == list(NAMES)


def test_initial_values_do_not_depend_on_earlier_random_numbers():
    state = official()
    first = initialize(IsdaConfig(), state).model.state_dict()
    before = torch.rand(3)
    other = initialize(IsdaConfig(), state).model.state_dict()
    assert all(torch.equal(first[name], other[name]) for name in first)
    assert not torch.equal(before, torch.rand(3))


def test_solq_takes_it_where_its_width_is_the_same():
    state = official()
    made = initialize(SolqConfig(hidden_dim=256), state)
    ours = made.model.state_dict()
    assert all(torch.equal(ours[f"class_heads.{i}.bias"], state["bbox_head.cls_branches.0.bias"]) for i in range(6))
    new = {name.split(".")[0] for name in made.initial}
    assert new == {"project", "box_heads", "mask_head", "codec"} or new == {"project", "box_heads", "mask_head"}
    assert all(name.startswith("project.convolutions.") and name.endswith(".bias") for name in made.initial if "project" in name)


def test_of_a_layer_that_does_not_fit_nothing_is_taken():
    made = initialize(SolqConfig(), official())  # 384 channels wide
    assert all(name.startswith("backbone.") for name in made.copied)
    assert "encoder.layers.0.feed_forward.up.bias" in made.initial  # which has the same shape


def test_with_another_number_of_queries_only_queries_are_not_copied():
    made = initialize(IsdaConfig(num_queries=100), official())
    assert {"query_position", "query_content"} <= set(made.initial)
    assert "level_embedding" in made.copied


def test_a_model_of_which_nothing_fits_is_refused():
    config = SolqConfig(backbone=BackboneConfig(name="convnext_atto", frozen_stages=0))
    with pytest.raises(ConversionError, match="nothing of the Deformable DETR fits solq with backbone convnext_atto"):
        initialize(config, official())


def test_a_resnet_with_strides_elsewhere_is_refused_though_the_shapes_fit():
    with pytest.raises(
        ConversionError, match="sotr cannot start from a Deformable DETR: its ResNet puts the stride in a different"
    ):
        initialize(SotrConfig(), official())


def test_another_file_is_refused():
    with pytest.raises(ConversionError, match="unknown entries: fc"):
        initialize(IsdaConfig(), {"fc": torch.zeros(1)})
    with pytest.raises(ConversionError, match="the checkpoint has no tensor for maskset's query"):
        initialize(IsdaConfig(), {name: value for name, value in official().items() if "query" not in name})


def test_the_command_writes_a_start_and_says_what_it_took(tmp_path, capsys):
    source, out = tmp_path / "detr.pth", tmp_path / "start.safetensors"
    torch.save({"meta": {"epoch": 50}, "state_dict": official()}, source)
    assert main(["convert", "isda", "--from", "deformable-detr", str(source), str(out)]) == 0
    said = capsys.readouterr().out
    assert "copied, " in said
    assert "initialized randomly, 33 tensors: project_finest 3, mask_feature_head 24, kernel_head 6" in said
    assert "not used, 36 tensors: reg_branches 36" in said
    level_embedding = read_state_dict(source)["bbox_head.transformer.level_embeds"]
    assert torch.equal(maskset.load(out).state_dict()["level_embedding"], level_embedding)
    assert "Deformable DETR checkpoint detr.pth, sha256" in read_metadata(out).source
    assert main(["convert", "yolact", "--from", "deformable-detr", str(source), str(tmp_path / "no.safetensors")]) == 2


def test_an_initialized_model_keeps_the_settings_that_it_is_made_for():
    config = replace(IsdaConfig(), dropout=0.3, mask_stride=8)
    assert initialize(config, official()).model.config == config
