"""Official SOIT checkpoints."""

import pytest
import torch
from goldens import notes, weights

import maskset
from maskset.conversion import convert, convert_file
from maskset.conversion.class_names import NAMES
from maskset.errors import ConversionError
from maskset.systems import build


def official() -> dict[str, torch.Tensor]:
    """Return a state dict of the official layout, whose six mask heads are one as in a real file."""
    state = weights(notes("soit")["state_dict"])
    return {name: state[name.replace("seg_branches.0", "seg_branches.5")] if "seg_branches.0" in name else value
            for name, value in state.items() if not any(f"seg_branches.{i}." in name for i in range(1, 5))}  # fmt: skip


def test_the_config_is_read_off_the_shapes():
    config, state = convert("soit", official())
    assert config == maskset.recipes.get("soit-r50").model
    build(config).load_state_dict(state, strict=True)


def test_a_model_with_eight_mask_heads_is_recognized():
    state = official()
    for i in (0, 5):
        state[f"bbox_head.seg_branches.{i}.4.weight"] = torch.zeros(873, 256)
        state[f"bbox_head.seg_branches.{i}.4.bias"] = torch.zeros(873)
    config, ours = convert("soit", state)
    assert config.mask_heads == 8
    build(config).load_state_dict(ours, strict=True)


def test_mask_heads_that_differ_are_refused_unless_the_last_is_asked_for():
    state = weights(notes("soit")["state_dict"])
    with pytest.raises(ConversionError, match=r"copies of one tensor differ: bbox_head\.seg_branches\.0\.0\.weight and"):
        convert("soit", state)
    _, ours = convert("soit", state, use_last_copy=True)
    assert torch.equal(ours["mask_head.layers.0.weight"], state["bbox_head.seg_branches.5.0.weight"])


def test_a_checkpoint_of_another_system_is_refused():
    with pytest.raises(ConversionError, match=r"unknown entries: .*mask_feat_head"):
        convert("soit", official() | {"mask_feat_head.conv_pred.0.conv.weight": torch.zeros(1)})


def test_a_number_of_mask_weights_that_fits_nothing_is_refused():
    state = official()
    for i in (0, 5):
        state[f"bbox_head.seg_branches.{i}.4.weight"] = torch.zeros(440, 256)
    with pytest.raises(ConversionError, match="440 mask weights do not match any number of heads with 8 channels and 4 points"):
        convert("soit", state)


def test_a_converted_file_knows_cocos_classes(tmp_path):
    torch.save({"meta": {"epoch": 50}, "state_dict": official()}, tmp_path / "soit.pth")
    convert_file("soit", tmp_path / "soit.pth", tmp_path / "soit.safetensors")
    model = maskset.load(tmp_path / "soit.safetensors")
    assert [(c.coco_id, c.name) for c in model.categories] == list(NAMES.items())
