import re

import pytest
import torch
from goldens import notes, weights

import maskset
from maskset.checkpoint import read_metadata
from maskset.conversion import convert, convert_file
from maskset.conversion.class_names import NAMES
from maskset.errors import ConversionError
from maskset.systems import build
from maskset.systems.isda import IsdaConfig


def official() -> dict[str, torch.Tensor]:
    """Return a state dict of the official layout, with the six copies of class and kernel branch equal."""
    state = weights(notes("isda")["state_dict"])
    for name in state:
        if "_branches." in name:
            state[name] = state[re.sub(r"_branches\.\d", "_branches.0", name)]
    return state


def narrow(state: dict[str, torch.Tensor], part: str, size: tuple[slice, ...]) -> dict[str, torch.Tensor]:
    """Return the state with less of every entry whose name contains a text."""
    return {name: value[size] if part in name else value for name, value in state.items()}


def test_the_config_is_read_off_the_shapes():
    config, state = convert("isda", official())
    assert config == IsdaConfig()
    build(config).load_state_dict(state, strict=True)


def test_other_sizes_convert():
    state = narrow(official(), "query_embedding", (slice(20),))
    state = narrow(state, "cls_branches", (slice(5),))
    state = {name: value for name, value in state.items() if not any(f"coder.layers.{i}." in name for i in (3, 4, 5))}
    config, ours = convert("isda", state)
    assert (config.num_queries, config.num_classes, config.encoder_layers, config.decoder_layers) == (20, 5, 3, 3)
    build(config).load_state_dict(ours, strict=True)


def test_the_ablations_of_position_are_recognized():
    without = narrow(official(), "convs_all_levels.3.conv0.conv", (slice(None), slice(256)))
    config, ours = convert("isda", without)
    assert (config.feature_coordinates, config.kernel_position) == (False, True)
    build(config).load_state_dict(ours, strict=True)
    state = official()
    for name in [name for name in state if re.search(r"kernel_branches\.\d\.4\.", name)]:
        state[name] = torch.zeros(256, *state[name].shape[1:])
    config, ours = convert("isda", state)
    assert (config.feature_coordinates, config.kernel_position) == (True, False)
    build(config).load_state_dict(ours, strict=True)


def test_an_entry_of_another_system_is_named():
    with pytest.raises(ConversionError, match=r"bbox_head\.reg_branches\.0\.0\.weight"):
        convert("isda", official() | {"bbox_head.reg_branches.0.0.weight": torch.zeros(1)})


@pytest.mark.parametrize("name", ["mask_feat_head.convs_all_levels.3.conv0.conv.weight", "bbox_head.query_embedding.weight"])
def test_a_missing_entry_is_named(name):
    state = official()
    del state[name]
    with pytest.raises(ConversionError, match="has no tensor for maskset's (mask_feature_head.branches.3.0|query)"):
        convert("isda", state)


def test_copies_that_differ_are_refused_unless_the_last_is_asked_for():
    state = official()
    name = "bbox_head.kernel_branches.5.4.bias"
    state[name] = state[name] + 1
    with pytest.raises(ConversionError, match=r"kernel_branches\.4\.4\.bias.*kernel_branches\.5\.4\.bias.*--use-last-copy"):
        convert("isda", state)
    assert torch.equal(convert("isda", state, use_last_copy=True)[1]["kernel_head.layers.2.bias"], state[name])


def test_a_file_becomes_a_checkpoint_with_the_classes_of_coco(tmp_path):
    source = tmp_path / "official.pth"
    torch.save({"meta": {"mmdet_version": "2.17.0", "CLASSES": ("person",)}, "state_dict": official()}, source)
    out = convert_file("isda", source, tmp_path / "isda.safetensors", license="Apache-2.0").file
    model = maskset.load(out)
    assert [category.coco_id for category in model.categories] == list(NAMES)
    assert (model.categories[0].name, model.categories[79].name) == ("person", "toothbrush")
    metadata = read_metadata(out)
    assert metadata.recipe.train.batch_size == 8
    assert metadata.source.startswith("official isda checkpoint official.pth, sha256 ")
    with pytest.raises(ConversionError, match="coco80 needs the 91 class channels"):
        convert_file("isda", source, tmp_path / "again.safetensors", coco80=True)
