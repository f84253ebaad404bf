"""Settings of data and training that would go wrong in silence, or late, are refused at once."""

import pytest

from maskset import flags
from maskset.config import from_dict, to_dict
from maskset.errors import ConfigError
from maskset.recipe import DataConfig, Recipe, TrainConfig
from maskset.systems.isda import IsdaConfig


@pytest.mark.parametrize(
    "name", ["backbone_learning_rate", "offset_learning_rate", "weight_decay", "drop_factor", "warmup_steps", "clip_norm", "seed"]
)
def test_a_negative_number_is_refused(name):
    with pytest.raises(ConfigError, match=f"train.{name} must not be negative, got -1"):
        TrainConfig(**{name: -1})


@pytest.mark.parametrize("name", ["batch_size", "steps", "epochs", "warmup_steps", "max_detections"])
def test_counts_that_would_overflow_are_refused(name):
    with pytest.raises(ConfigError, match=rf"train\.{name} must be (at most \d+|in \[1, 65536\]), got 1{'0' * 20}\."):
        TrainConfig(**{name: 10**20})


def test_a_run_of_no_steps_is_refused():
    with pytest.raises(ConfigError, match="train.steps must be at least 1, got 0"):
        TrainConfig(steps=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_refused(value):
    numbers = [name for name, default in vars(TrainConfig()).items() if isinstance(default, float)]
    assert "learning_rate" in numbers
    for name in numbers:
        with pytest.raises(ConfigError, match=f"train.{name} must be a finite number, got {value}"):
            TrainConfig(**{name: value})
    with pytest.raises(ConfigError, match=f"data.jitter_scale must be a finite number, got {value}"):
        DataConfig(jitter_scale=(0.1, value))


def test_the_meaning_of_every_augmentation_is_in_its_help():
    (setting,) = (entry for entry in flags.flatten(DataConfig()) if entry.name == "augmentation")
    assert [part.split(":")[0] for part in setting.help.split("; ")] == ["detr", "mmdet", "flip", "lsj", "none"]
    assert all(": " in part for part in setting.help.split("; "))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_short_sides": ()}, "crop_short_sides needs one or more .*augmentation detr"),
        ({"crop_short_sides": (), "augmentation": "mmdet"}, "crop_short_sides needs one or more .*augmentation mmdet"),
        ({"crop_short_sides": (0,)}, "at least 1"),
        ({"long_side": 0}, r"data\.long_side must be at least 1, got 0"),
        ({"jitter_size": 0}, "at least 1"),
        ({"jitter_scale": (2.0, 0.1)}, "jitter_scale must be .low, high. with 0 < low"),
        ({"crop_range": (600, 384)}, "crop_range must be .low, high. with low <= high"),
        ({"crop_range": (0, 384)}, r"data\.crop_range must be at least 1, got 0"),
        ({"crop_fraction": 1.5}, r"crop_fraction must be in \[0, 1\]"),
        ({"workers": 10**20}, r"data\.workers must be in \[0, 1024\], got 1"),
        ({"short_sides": ()}, "short_sides needs one or more"),
    ],
)
def test_sizes_that_no_image_can_have_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig(**settings)


@pytest.mark.parametrize("name", ["patience", "evaluate_every", "checkpoint_every"])
def test_negative_counts_are_refused(name):
    with pytest.raises(ConfigError, match=f"train.{name} must not be negative, got -1"):
        TrainConfig(**{name: -1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_querys": 3}, "there is no setting 'model.num_querys'; did you mean 'num_queries'"),
        ({"codec": "dct"}, "there is no setting 'model.codec'.$"),
        ({"input": {"divisr": 32}}, "there is no setting 'model.input.divisr'; did you mean 'divisor'"),
        ({"num_queries": "many"}, "model.num_queries must be a whole number, got 'many'"),
        ({"num_queries": 0}, "model.num_queries must be at least 1, got 0"),
        ({"system": "idsa"}, "model.system must be one of .*'istr-smt', .*'sotr'.*, got 'idsa'"),
        ({"system": None}, "model.system is missing"),
    ],
)
def test_the_error_names_a_wrong_setting_of_a_model(changes, message):
    values = to_dict(Recipe(model=IsdaConfig()))
    with pytest.raises(ConfigError, match=message):
        from_dict(Recipe, {**values, "model": {**values["model"], **changes}}, "here")


def test_settings_that_do_not_say_their_system_are_refused():
    with pytest.raises(ConfigError, match=r"model\.system is missing"):
        from_dict(Recipe, {"model": {"num_queries": 3}}, "here")


def test_crop_sides_are_not_needed_without_crops():
    assert DataConfig(augmentation="flip", crop_short_sides=()).crop_short_sides == ()
