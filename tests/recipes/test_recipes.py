"""Recipes by name and by file."""

from dataclasses import replace
from pathlib import Path

import pytest

from maskset import config, recipes
from maskset.recipes import RECIPES, backbones
from maskset.recipes.backbones import small_backbone
from maskset.recipes.solq import SCRATCH
from maskset.systems.base import InputConfig
from maskset.training.optimizer import learning_rate_scale, rate_factor

FOLDER = Path(recipes.__file__).parent


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_written_and_read_back(name, tmp_path):
    recipe = RECIPES[name]()
    config.write(recipe, tmp_path / "recipe.json")
    assert recipes.get(tmp_path / "recipe.json") == recipe
    assert recipes.get(str(tmp_path)) == recipe


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_says_how_to_run_it_what_to_expect_and_what_of_it_is_known(name):
    text = RECIPES[name].__doc__ or ""
    assert f"train {name} --data" in text
    assert "Expect: " in text
    assert "Status: " in text


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_function_of_the_package(name):
    assert getattr(recipes, name.replace("-", "_")) is RECIPES[name]


def test_every_function_of_a_recipe_file_that_returns_a_recipe_is_listed():
    functions = [line for file in FOLDER.glob("*.py") for line in file.read_text().splitlines() if line.endswith("() -> Recipe:")]
    assert len(functions) == len(RECIPES)


def test_the_official_recipe_is_the_default_of_every_setting():
    recipe = recipes.solq_r50()
    assert (recipe.model.num_queries, recipe.model.hidden_dim, recipe.model.code_length) == (300, 384, 256)
    assert (recipe.train.learning_rate, recipe.train.backbone_learning_rate) == (2e-4, 2e-5)
    assert (recipe.train.batch_size, recipe.train.epochs, recipe.train.drop_epochs) == (32, 50, (40,))
    assert (recipe.train.clip_norm, recipe.train.weight_decay, recipe.train.warmup_steps) == (0.1, 1e-4, 0)


def test_isda_has_the_official_schedule():
    recipe = recipes.isda_r50()
    assert (recipe.model.num_queries, recipe.model.hidden_dim, recipe.model.mask_dim) == (300, 256, 256)
    assert (recipe.train.learning_rate, recipe.train.backbone_learning_rate) == (1.25e-4, 1.25e-5)
    assert recipe.train.offset_learning_rate == 1.25e-5
    assert (recipe.train.batch_size, recipe.train.epochs, recipe.train.drop_epochs) == (8, 42, (27, 33, 35, 36, 37))
    assert (recipe.train.clip_norm, recipe.train.weight_decay, recipe.train.warmup_steps) == (0.1, 1e-4, 0)


def test_istr_has_the_official_schedule():
    for recipe in (recipes.istr_r50(), recipes.istr_smt_r50()):
        train = recipe.train
        assert train.learning_rate == train.backbone_learning_rate == 2.5e-5
        assert (train.batch_size, train.clip_norm, train.weight_decay, train.warmup_steps) == (16, 1.0, 1e-4, 1000)
        factors = [rate_factor(step, 7330, train) for step in (209_999, 210_000, 249_999, 250_000, 269_999)]
        assert factors == pytest.approx([1, 0.1, 0.1, 0.01, 0.01])
    assert (recipes.istr_r50().data.crop_fraction, recipes.istr_r50().data.short_sides[-1]) == (0.7, 800)
    assert (recipes.istr_smt_r50().data.crop_fraction, recipes.istr_smt_r50().data.short_sides[-1]) == (0.0, 1088)


def test_sotr_has_the_official_schedule():
    train = recipes.sotr_r50().train
    assert (train.optimizer, train.momentum, train.learning_rate, train.backbone_learning_rate) == ("sgd", 0.9, 0.01, 0.01)
    assert (train.batch_size, train.clip_norm, train.weight_decay) == (8, 0, 1e-4)
    factors = [rate_factor(step, 14_786, train) for step in (0, 999, 209_999, 210_000, 249_999, 250_000, 299_999)]
    assert factors == pytest.approx([0.001, 1, 1, 0.1, 0.1, 0.01, 0.01])


def test_sotrs_models_have_the_sizes_and_backbones_of_their_configurations():
    r50, r101, dcn, rt = recipes.sotr_r50(), recipes.sotr_r101(), recipes.sotr_r101_dcn(), recipes.sotr_rt()
    assert [recipe.model.input.short_side for recipe in (r50, r101, dcn, rt)] == [1000, 800, 1000, 736]
    assert [recipe.data.long_side for recipe in (r50, r101, dcn, rt)] == [2048, 1333, 2048, 1333]
    assert (1024 in r50.data.short_sides, 1024 in r101.data.short_sides) == (True, False)
    names = [recipe.model.backbone.name for recipe in (r50, r101, dcn, rt)]
    assert names == ["resnet50.tv_in1k", "resnet101.tv_in1k", "resnet101.tv_in1k", "resnet50.tv_in1k"]
    assert (dcn.model.backbone.deformable_stages, rt.model.depth) == (3, 2)


def test_linear_scaling_of_isdas_learning_rate_gives_that_of_deformable_detr():
    train = replace(recipes.isda_r50().train, scale_learning_rate=True)
    assert train.learning_rate * learning_rate_scale(train) == pytest.approx(2e-4 * 8 / 32)
    assert train.learning_rate * learning_rate_scale(replace(train, batch_size=3)) == pytest.approx(1.87e-5, rel=0.01)


def test_the_swin_recipe_has_the_authors_image_sizes():
    recipe = recipes.solq_swin_l()
    assert recipe.data.short_sides[0] == 416
    assert recipe.data.short_sides[-1] == recipe.model.input.short_side == 1088


@pytest.mark.parametrize("name", ["solq-tiny", "solq_tiny", "SOLQ-Tiny"])
def test_a_name_may_be_written_as_in_python(name):
    assert recipes.get(name) == recipes.solq_tiny()


def test_a_mistyped_name_is_answered_with_near_ones():
    with pytest.raises(config.ConfigError, match="or run folder 'solq-r5O'; did you mean solq-r50"):
        recipes.get("solq-r5O")


def test_a_name_near_none_is_answered_with_all():
    with pytest.raises(config.ConfigError, match="the recipes are solq-r50, solq-r101.*sotr-tiny"):
        recipes.get("yolo")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(config.ConfigError, match=r"gone\.json cannot be read"):
        recipes.get(tmp_path / "gone.json")


def test_recipes_that_learn_from_scratch_freeze_nothing(monkeypatch):
    monkeypatch.setattr(backbones, "find_spec", lambda _: None)
    systems = (
        recipes.solq_tiny,
        recipes.solq_small,
        recipes.isda_tiny,
        recipes.isda_small,
        recipes.istr_tiny,
        recipes.istr_small,
    )
    for recipe in (*(make() for make in systems), recipes.sotr_tiny(), recipes.sotr_small()):
        backbone = recipe.model.backbone
        assert (backbone.pretrained, backbone.frozen_stages, backbone.norm) == (False, 0, "group")
        assert replace(recipe.model, num_classes=1).num_classes == 1


def test_a_small_backbone_starts_from_imagenet_where_its_weights_are_installed():
    backbone, input = small_backbone()
    assert (backbone.name, backbone.norm, backbone.frozen_stages, backbone.pretrained) == (
        "tf_efficientnet_lite0",
        "frozen",
        0,
        True,
    )
    assert set(input.mean + input.std) == {0.5}
    for recipe in (make() for name, make in RECIPES.items() if name.endswith("-small")):
        assert recipe.model.backbone == backbone
        assert (recipe.model.input.mean, recipe.model.input.std) == (input.mean, input.std)
        assert (recipe.model.input.short_side, recipe.model.input.channel_order) == (256, "rgb")


def test_a_small_backbone_starts_from_random_weights_where_none_are_installed(monkeypatch):
    monkeypatch.setattr(backbones, "find_spec", lambda _: None)
    assert small_backbone() == (SCRATCH, InputConfig())
