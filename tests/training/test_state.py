"""What a run is resumed from."""

import random
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from runs import recipe

from maskset import config
from maskset.errors import CheckpointError, ConfigError
from maskset.systems import build
from maskset.training.optimizer import build_optimizer
from maskset.training.state import (
    MAY_CHANGE,
    Progress,
    TrainingState,
    check_folder,
    check_recipe,
    differences,
    load_state,
    save_state,
    seed_everything,
)
from maskset.training.step import averaged_copy

DATA = {"images": 3, "categories": [["a", 1]]}


def trained(seed, steps=0, **model):
    torch.manual_seed(seed)
    network = build(replace(recipe().model, **model))
    optimizer = build_optimizer(network, recipe().train)
    averaged = averaged_copy(network)
    for _ in range(steps):
        for parameter in network.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return TrainingState(network, optimizer, averaged)


def test_everything_comes_back(tmp_path):
    before, after = trained(0, steps=2), trained(1)
    progress = Progress(epoch=3, step=17, best=0.25, evaluations_since_best=1, log_bytes=99)
    save_state(tmp_path, before, progress, DATA)
    assert load_state(tmp_path, after, DATA) == progress
    for old, new in ((before.model, after.model), (before.averaged, after.averaged)):
        for (name, a), (_, b) in zip(old.state_dict().items(), new.state_dict().items(), strict=True):
            assert torch.equal(a, b), name
    for a, b in zip(before.model.parameters(), after.model.parameters(), strict=True):
        old, new = before.optimizer.state[a], after.optimizer.state[b]
        assert old.keys() == new.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(old[key], new[key]) for key in old)


def test_the_optimizer_goes_on_as_if_it_had_not_stopped(tmp_path):
    before, after = trained(0, steps=2), trained(1)
    save_state(tmp_path, before, Progress(), DATA)
    load_state(tmp_path, after, DATA)
    for state in (before, after):
        torch.manual_seed(5)
        for parameter in state.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        state.optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before.model.parameters(), after.model.parameters(), strict=True))


def test_the_state_is_one_file_without_leftovers(tmp_path):
    save_state(tmp_path, trained(0), Progress(), DATA)
    save_state(tmp_path, trained(0, 1), Progress(step=1), DATA)
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


def test_other_data_are_refused_by_what_differs(tmp_path):
    save_state(tmp_path, trained(0), Progress(), DATA)
    with pytest.raises(ConfigError, match="images: 3 then, 4 now"):
        load_state(tmp_path, trained(0), {**DATA, "images": 4})


@pytest.mark.parametrize("damage", [lambda old: old[:1000], lambda old: b"", lambda old: b"PK\x03\x04" + old])
def test_a_damaged_state_is_refused(tmp_path, damage):
    save_state(tmp_path, trained(0), Progress(), DATA)
    file = tmp_path / "state.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match=r"state\.safetensors is "):
        load_state(tmp_path, trained(0), DATA)


def test_a_state_of_another_network_is_refused(tmp_path):
    save_state(tmp_path, trained(0), Progress(), DATA)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        load_state(tmp_path, trained(0, num_queries=5), DATA)


def test_random_numbers_follow_from_seed_step_and_process_alone():
    def drawn(*place):
        seed_everything(*place)
        return random.random(), np.random.rand(), torch.rand(1).item()

    first = drawn(1, 2, 3)
    assert drawn(1, 2, 3) == first
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0), (2, 1, 3)):
        assert all(a != b for a, b in zip(drawn(*other), first, strict=True))


def test_the_settings_that_a_resumed_run_may_change_are_all_there_and_do_not_count():
    old = recipe()
    new = replace(
        old, data=replace(old.data, workers=7, skip_broken=True), train=replace(old.train, epochs=99, patience=3, log_every=5)
    )
    assert differences(old, new, MAY_CHANGE) == []
    assert differences(old, replace(old, train=replace(old.train, seed=1))) == ["train.seed was 42, is 1"]
    names = {f"train.{name}" for name in asdict(old.train)} | {f"data.{name}" for name in asdict(old.data)}
    assert names > MAY_CHANGE


def test_a_run_of_a_number_of_steps_cannot_be_made_longer_and_the_error_says_what_may_change(tmp_path):
    short = replace(recipe(), train=replace(recipe().train, steps=9))
    config.write(short, tmp_path / "recipe.json")
    check_recipe(tmp_path, replace(short, train=replace(short.train, patience=3)))
    for change, message in (({"epochs": 99}, "train.epochs was 2, is 99"), ({"steps": 10}, "train.steps was 9, is 10")):
        with pytest.raises(ConfigError, match=message) as error:
            check_recipe(tmp_path, replace(short, train=replace(short.train, **change)))
        assert "A run with train.steps cannot be made longer" in str(error.value)
    config.write(recipe(), tmp_path / "recipe.json")
    with pytest.raises(ConfigError, match=r"train\.seed was 42, is 1.*only these may change: .*train\.epochs"):
        check_recipe(tmp_path, replace(recipe(), train=replace(recipe().train, seed=1)))


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(ConfigError, match="is a file; a run needs a folder"):
        check_folder(tmp_path / "run", resume=False)


def test_a_folder_of_other_things_may_be_used(tmp_path):
    (tmp_path / "notes.txt").touch()
    check_folder(tmp_path, resume=False)


def test_a_recipe_of_another_version_is_an_error_that_names_the_file(tmp_path):
    config.write(recipe(), tmp_path / "recipe.json")
    text = (tmp_path / "recipe.json").read_text().replace("num_queries", "queries")
    (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(ConfigError, match=r"recipe\.json: there is no setting .*queries"):
        check_recipe(tmp_path, recipe())
