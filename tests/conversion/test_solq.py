import argparse
import hashlib
import pickle
import warnings
from dataclasses import replace

import pytest
import torch
from goldens import notes, weights

import maskset
from maskset.checkpoint import read_metadata
from maskset.cli import main
from maskset.conversion import _select_classes, convert, convert_file, read_state_dict
from maskset.conversion.class_names import NAMES, raw_categories, read_class_names, used_categories
from maskset.errors import ConfigError, ConversionError
from maskset.instances import Category
from maskset.systems import build


def official(**replaced) -> dict[str, torch.Tensor]:
    """Return a state dict of the official layout with equal aliases, and other entries replaced (None: left out)."""
    state = weights(notes("solq")["state_dict"])
    for alias, name in notes("solq")["aliases"].items():
        state[alias] = state[name]
    state |= replaced
    return {name: value for name, value in state.items() if value is not None}


def small() -> dict[str, torch.Tensor]:
    """Return a narrow model in the official layout: 32 channels, 2 + 1 layers, 20 queries, 16 numbers a mask, ResNet-50."""
    shapes = {name: list(shape) for name, shape in notes("solq")["state_dict"]}
    keep = {}
    for name, shape in shapes.items():
        if any(f"coder.layers.{i}." in name for i in range(2, 6)) or "decoder.layers.1." in name:
            continue
        if any(name.startswith(f"{head}.{i}.") for head in ("class_embed", "bbox_embed", "vector_embed") for i in range(1, 6)):
            continue
        if any(f"decoder.bbox_embed.{i}." in name for i in range(1, 6)):
            continue
        if not name.startswith("backbone"):
            narrower = {384: 32, 768: 64, 1152: 96, 300: 20, 1024: 64} | ({256: 16} if "vector_embed" in name else {})
            shape = [
                narrower.get(n, n) if not (name.startswith("input_proj") and axis == 1) else n for axis, n in enumerate(shape)
            ]
        keep[name] = shape
    state = weights(list(keep.items()))
    for alias, name in notes("solq")["aliases"].items():
        if alias in state and name in state:
            state[alias] = state[name]
    return state


def test_the_config_is_read_off_the_shapes():
    config, state = convert("solq", official())
    assert config == replace(maskset.recipes.get("solq-r50").model, num_classes=91)
    build(config).load_state_dict(state, strict=True)


def test_any_width_and_count_converts():
    config, state = convert("solq", small())
    sizes = (config.hidden_dim, config.num_queries, config.encoder_layers, config.decoder_layers, config.code_length)
    assert sizes == (32, 20, 2, 1, 16)
    assert (config.num_points, config.feedforward_dim, config.mask_hidden_dim) == (4, 64, 64)
    build(config).load_state_dict(state, strict=True)


def test_swin_is_recognized():
    state = {k: v for k, v in small().items() if not k.startswith("backbone")}
    state |= weights(notes("solq")["swin_t_state_dict"])
    channels = {0: 192, 1: 384, 2: 768, 3: 768}
    for level, count in channels.items():
        old = state[f"input_proj.{level}.0.weight"]
        state[f"input_proj.{level}.0.weight"] = torch.zeros(len(old), count, *old.shape[2:])
    config, ours = convert("solq", state)
    assert (config.backbone.name, config.input.short_side, config.backbone.drop_path) == ("swin_tiny", 1088, 0.2)
    build(config).load_state_dict(ours, strict=True)


def test_an_unknown_entry_is_named():
    with pytest.raises(ConversionError, match=r"transformer\.surprise"):
        convert("solq", small() | {"transformer.surprise": torch.zeros(1)})


def test_a_missing_entry_is_named():
    state = small()
    del state["transformer.level_embed"]
    with pytest.raises(ConversionError, match="level_embedding"):
        convert("solq", state)


def test_copies_that_differ_are_refused_unless_the_last_is_asked_for():
    state = official()
    state["vector_embed.3.layers.2.bias"] = state["vector_embed.3.layers.2.bias"] + 1
    with pytest.raises(ConversionError, match=r"vector_embed\.2.*vector_embed\.3.*--use-last-copy"):
        convert("solq", state)
    _, ours = convert("solq", state, use_last_copy=True)
    assert torch.equal(ours["mask_head.layers.2.bias"], state["vector_embed.5.layers.2.bias"])


def test_other_systems_and_state_dicts_are_refused():
    with pytest.raises(ConversionError, match="must be one of solq, .* got 'yolact': the system comes first"):
        convert("yolact", {})
    with pytest.raises(ConversionError, match="got 'slq'; did you mean 'solq'"):
        convert("slq", {})
    with pytest.raises(ConversionError, match="unknown entries: fc"):
        convert("solq", {"fc": torch.zeros(1)})
    with pytest.raises(ConversionError, match="level_embedding"):
        convert("solq", {})


def test_a_file_becomes_a_checkpoint_that_loads(tmp_path):
    source = tmp_path / "official.pth"
    state = {f"module.{name}": value for name, value in small().items()}
    torch.save({"model": state, "epoch": 49, "args": argparse.Namespace(lr=2e-4)}, source)
    out = convert_file("solq", source, tmp_path / "solq.safetensors", license="Apache-2.0").file
    model = maskset.load(out)
    assert model.categories == raw_categories()
    metadata = read_metadata(out)
    assert hashlib.sha256(source.read_bytes()).hexdigest() in metadata.source
    assert metadata.license == "Apache-2.0"
    torch.save({"epoch": 3}, source)
    with pytest.raises(ConversionError, match="does not contain a state dict"):
        read_state_dict(source)


def test_coco80_keeps_the_classes_that_coco_has(tmp_path):
    source = tmp_path / "official.pth"
    state = small()
    torch.save({"model": state}, source)
    model = maskset.load(convert_file("solq", source, tmp_path / "solq80.safetensors", coco80=True).file)
    assert len(model.categories) == 80
    assert [c.coco_id for c in model.categories] == list(NAMES)
    assert model.categories[79].name == "toothbrush"
    assert torch.equal(model.state_dict()["class_heads.0.bias"], state["class_embed.0.bias"][list(NAMES)])


def test_of_the_proposals_class_head_the_first_channels_are_kept():
    heads = {
        "class_heads.0.bias": torch.arange(5),
        "proposal_class_head.bias": torch.arange(5),
        "box_heads.0.bias": torch.arange(4),
    }
    selected = {name: value.tolist() for name, value in _select_classes(heads, [1, 4]).items()}
    assert selected == {"class_heads.0.bias": [1, 4], "proposal_class_head.bias": [0, 1], "box_heads.0.bias": [0, 1, 2, 3]}


def test_a_file_that_is_there_and_another_ending_are_refused(tmp_path):
    source = tmp_path / "official.pth"
    torch.save(small(), source)
    before = source.read_bytes()
    with pytest.raises(ConfigError, match="must end in .safetensors"):
        convert_file("solq", source, source)
    (tmp_path / "mine.safetensors").write_text("mine")
    with pytest.raises(ConfigError, match="already exists: choose another name"):
        convert_file("solq", source, tmp_path / "mine.safetensors")
    assert source.read_bytes() == before
    assert (tmp_path / "mine.safetensors").read_text() == "mine"


def test_an_entry_of_other_dimensions_and_a_name_that_is_not_text_are_named(tmp_path):
    with pytest.raises(ConversionError, match=r"maskset's query has the shape \[20\], expected 2 dimensions"):
        convert("solq", small() | {"query_embed.weight": torch.zeros(20)})
    torch.save({1: torch.zeros(2)}, tmp_path / "numbers.pth")
    with pytest.raises(ConversionError, match="unknown entries: 1"):
        convert("solq", read_state_dict(tmp_path / "numbers.pth"))


class Bomb:
    """What a hostile pickle does when it is read."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was executed')",))


@pytest.mark.parametrize(
    "write", [lambda path: torch.save({"model": Bomb()}, path), lambda path: path.write_bytes(pickle.dumps(Bomb()))]
)
def test_a_pickle_is_never_executed(tmp_path, write):
    path = tmp_path / "official.pth"
    write(path)
    with pytest.raises(ConversionError, match="safely"):
        read_state_dict(path)


def test_a_pickle_is_refused_without_a_word_from_torch(tmp_path):
    path = tmp_path / "official.pth"
    path.write_bytes(pickle.dumps(Bomb(), protocol=4))  # of which torch warns
    with warnings.catch_warnings(record=True, action="always") as caught, pytest.raises(ConversionError, match="Unpickling"):
        read_state_dict(path)
    assert not caught


def test_a_file_that_is_none_is_refused(tmp_path):
    path = tmp_path / "official.pth"
    with pytest.raises(ConversionError, match="does not exist"):
        read_state_dict(path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ConversionError, match=r"official\.pth is not a PyTorch file: convert takes an official \.pth"):
        read_state_dict(path)
    torch.save(small(), path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ConversionError, match="cannot be read safely"):
        read_state_dict(path)


@pytest.fixture
def own(tmp_path):
    """An official SOLQ that was fine-tuned on three classes: four channels."""
    state = {name: value[:4] if value.ndim and value.shape[0] == 91 else value for name, value in small().items()}
    torch.save({"model": state}, tmp_path / "own.pth")
    return tmp_path / "own.pth"


def test_other_numbers_of_classes_are_not_named_as_cocos(own, tmp_path):
    out = convert_file("solq", own, tmp_path / "own.safetensors").file
    assert [category.name for category in maskset.load(out).categories] == ["class 0", "class 1", "class 2", "class 3"]


@pytest.mark.parametrize(("categories", "channels"), [(raw_categories, 91), (used_categories, 80)])
def test_only_cocos_number_of_channels_has_cocos_names(categories, channels):
    assert "person" in [category.name for category in categories(channels)]
    for other in (1, 4, channels - 1, channels + 1):
        assert [category.name for category in categories(other)] == [f"class {i}" for i in range(other)]


def test_the_command_takes_class_names_and_says_what_it_converted(own, tmp_path, capsys):
    (tmp_path / "names.txt").write_text("background\ncell\ndebris\r\nZellkern, groß\n\n", encoding="utf-8-sig")
    out = str(tmp_path / "own.safetensors")
    assert main(["convert", "solq", str(own), out, "--classes", str(tmp_path / "names.txt")]) == 0
    names = ["background", "cell", "debris", "Zellkern, groß"]
    assert maskset.load(out).categories == tuple(Category(name, i) for i, name in enumerate(names))
    said = capsys.readouterr().out
    assert "weights of 'model'" in said
    assert "4 classes: background, cell, debris, Zellkern, groß" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"cell\ndebris\nhair\n", "names.txt has 3 class names, but the checkpoint has 4 class channels"),
        (b"a\nb\nc\nd\ne\n", "names.txt has 5 class names, but the checkpoint has 4"),
        (b"a\n\nc\nd\n", "names.txt, line 2: the line is empty"),
        (b"a\nb\nc\na\n", "names.txt, line 4: 'a' occurs twice"),
        (b"\xff\xfe\n", "cannot be read: it is not UTF-8 text"),
    ],
)
def test_class_names_that_do_not_fit_are_refused(own, tmp_path, text, message):
    (tmp_path / "names.txt").write_bytes(text)
    with pytest.raises(ConversionError, match=message):
        convert_file("solq", own, tmp_path / "own.safetensors", classes=tmp_path / "names.txt")
    assert not (tmp_path / "own.safetensors").exists()


def test_a_file_of_class_names_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ConversionError, match="nowhere.txt cannot be read: No such file"):
        read_class_names(tmp_path / "nowhere.txt", 4)
