"""Official checkpoints of 2021 and of 2022, which have some names in common and are not the same model."""

import pytest
import torch
from goldens import notes

from maskset.conversion import convert
from maskset.errors import ConversionError
from maskset.systems import build
from maskset.systems.istr import IstrConfig
from maskset.systems.istr_smt import IstrSmtConfig


def official(name: str) -> dict[str, torch.Tensor]:
    """Return a state dict of the official layout; what its numbers are does not matter here."""
    shapes = notes(name)["state_dict"]
    return {key: torch.zeros(shape, dtype=torch.int64 if "tracked" in key else torch.float32) for key, shape in shapes}


def fits(config, state) -> bool:
    build(config).load_state_dict(state, strict=True)
    return True


@pytest.mark.parametrize(("name", "config"), [("istr", IstrConfig()), ("istr-smt", IstrSmtConfig())])
def test_the_config_is_read_off_the_shapes(name, config):
    settings, state = convert(name, official(name))
    assert settings == config
    assert state["codec.fitted"]


def test_other_sizes_convert():
    state = official("istr")
    for key, value in list(state.items()):
        if any(f"head_series.{i}." in key for i in (2, 3, 4, 5)):
            del state[key]
        elif "class_logits" in key:
            state[key] = value[:5]
        elif "mask_logits" in key or key in ("mask_encoding.components", "mask_encoding.explained_variances"):
            state[key] = value[:40]
        elif key in ("pos_embeddings.weight", "init_proposal_boxes.weight"):
            state[key] = value[:20]
    config, ours = convert("istr", state)
    assert (config.stages, config.num_classes, config.code_length, config.num_queries) == (2, 5, 40, 20)
    assert fits(config, ours)


def test_the_three_codecs_of_2022_are_recognized():
    state = official("istr-smt")
    entries = {key: value for key, value in state.items() if not key.startswith(("mask_E", "mask_D")) and "ret_roi" not in key}
    entries = {key: value for key, value in entries.items() if not any(f"head_series.{i}." in key for i in (1, 2, 3, 4, 5))}
    config, ours = convert("istr-smt", entries)
    assert (config.codec, config.stages, config.averaged_stages) == ("dct", 1, 1)
    assert fits(config, ours)
    code = {"components": (256, 12544), "explained_variances": (256,), "means": (12544,)}
    config, ours = convert("istr-smt", entries | {f"mask_encoding.{key}": torch.zeros(shape) for key, shape in code.items()})
    assert config.codec == "logit-pca"
    assert fits(config, ours)


@pytest.mark.parametrize(("name", "other", "year"), [("istr", "istr-smt", 2022), ("istr-smt", "istr", 2021)])
def test_a_checkpoint_of_the_other_model_is_recognized(name, other, year):
    with pytest.raises(ConversionError, match=f"checkpoint of the code of {year}.*convert it as {other}"):
        convert(name, official(other))


def test_an_entry_that_is_missing_or_of_another_system_is_named():
    state = official("istr")
    with pytest.raises(ConversionError, match=r"head\.mask_branch"):
        convert("istr", state | {"head.mask_branch": torch.zeros(1)})
    del state["mask_encoding.components"]
    with pytest.raises(ConversionError, match=r"codec\.components"):
        convert("istr", state)
