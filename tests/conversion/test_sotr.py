import pytest
import torch
from goldens import notes

import maskset
from maskset.checkpoint import read_metadata
from maskset.conversion import convert, convert_file
from maskset.conversion.class_names import NAMES
from maskset.errors import ConversionError
from maskset.systems import build
from maskset.systems.sotr import SotrConfig


def official(depth: int = 12) -> dict[str, torch.Tensor]:
    """Return a state dict of the official layout, of zeros."""
    entries = {name: torch.zeros(shape) for name, shape in notes("sotr")["state_dict"]}
    return {name: value for name, value in entries.items() if ".blocks." not in name or int(name.split(".")[4]) < 2 * depth}


def deformable(state: dict[str, torch.Tensor], blocks: dict[int, int]) -> dict[str, torch.Tensor]:
    """Return the state with offsets in the first `blocks[stage]` blocks of each stage, in detectron2's names."""
    paths = [f"backbone.bottom_up.res{stage}.{i}" for stage, count in blocks.items() for i in range(count)]
    return state | {
        f"{path}.conv2_offset.{kind}": torch.zeros(
            27, *((state[f"{path}.conv2.weight"].shape[1], 3, 3) if kind == "weight" else ())
        )
        for path in paths
        for kind in ("weight", "bias")
    }


def resnet101(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the state with as many blocks in the third stage as a ResNet-101 has."""
    last = {name: value for name, value in state.items() if ".res4.5." in name}
    return state | {name.replace(".5.", f".{i}."): value for i in range(6, 23) for name, value in last.items()}


def test_the_config_is_read_off_the_shapes():
    config, state = convert("sotr", official())
    assert config == SotrConfig()
    build(config).load_state_dict(state, strict=True)


def test_other_depths_and_classes_convert():
    state = official(depth=2)
    state |= {f"cate_head.cate_pred.{kind}": state[f"cate_head.cate_pred.{kind}"][:5] for kind in ("weight", "bias")}
    config, ours = convert("sotr", state)
    assert (config.depth, config.num_classes) == (2, 5)
    build(config).load_state_dict(ours, strict=True)


def test_gates_and_halves_of_keys_and_values_find_their_places():
    state = official(depth=2)
    for i, name in enumerate(("2.0.fn.g", "2.1.fn.g", "3.0.g", "3.1.g")):
        state[f"cate_head.transformer.layers.blocks.{name}"] = torch.tensor(float(i))
    name = "cate_head.transformer.layers.blocks.2.1.fn.fn.to_kv.weight"
    state[name] = torch.arange(512.0)[:, None].expand(512, 256)
    _, ours = convert("sotr", state)
    assert ours["transformer.layers.1.gates"].tolist() == [0, 1, 2, 3]
    assert ours["transformer.layers.1.rows.key.weight"][:, 0].tolist() == list(range(256))
    assert ours["transformer.layers.1.rows.value.weight"][:, 0].tolist() == list(range(256, 512))


def test_a_deeper_backbone_is_tested_at_other_sizes():
    config, ours = convert("sotr", resnet101(official(depth=2)))
    assert (config.backbone.name, config.backbone.deformable_stages, config.input.short_side) == ("resnet101.tv_in1k", 0, 800)
    build(config).load_state_dict(ours, strict=True)
    config, ours = convert("sotr", deformable(resnet101(official(depth=2)), {3: 4, 4: 23, 5: 3}))
    assert (config.backbone.name, config.backbone.deformable_stages, config.input.short_side) == ("resnet101.tv_in1k", 3, 1000)
    build(config).load_state_dict(ours, strict=True)


@pytest.mark.parametrize("blocks", [{5: 2}, {3: 4}, {4: 6}])
def test_deformable_convolutions_in_other_places_are_refused(blocks):
    with pytest.raises(ConversionError, match=r"blocks in stage \d of the backbone have deformable convolutions: maskset builds"):
        convert("sotr", deformable(official(depth=1), blocks))


def test_an_entry_of_another_system_is_named():
    with pytest.raises(ConversionError, match=r"ins_head\.cate_tower\.0\.weight"):
        convert("sotr", official() | {"ins_head.cate_tower.0.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("mask_head.conv_pred.0.weight", "mask_feature_head.output.convolution.weight"),
        ("cate_head.transformer.layers.blocks.0.0.fn.fn.to_kv.weight", "transformer.layers.0.columns.key_value.weight"),
        ("cate_head.transformer.layers.blocks.1.1.g", "transformer.layers.0.gate.3"),
    ],
)
def test_a_missing_entry_is_named(name, ours):
    state = official(depth=1)
    del state[name]
    with pytest.raises(ConversionError, match=f"the checkpoint has no tensor for maskset's {ours}"):
        convert("sotr", state)


def test_a_file_becomes_a_checkpoint_with_the_classes_of_coco(tmp_path):
    source = tmp_path / "official.pth"
    torch.save({"model": official(depth=1), "iteration": 299_999}, source)
    out = convert_file("sotr", source, tmp_path / "sotr.safetensors", license="MIT").file
    model = maskset.load(out)
    assert [category.coco_id for category in model.categories] == list(NAMES)
    metadata = read_metadata(out)
    assert (metadata.recipe.train.batch_size, metadata.recipe.train.optimizer) == (8, "sgd")
    assert metadata.source.startswith("official sotr checkpoint official.pth, sha256 ")
