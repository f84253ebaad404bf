"""The model in the package, "nuclei"."""

from dataclasses import replace
from pathlib import Path

import pytest

import maskset
from maskset.checkpoint import BUNDLED, bundled_models, find, is_model, load, read_metadata
from maskset.data import open_data
from maskset.errors import CheckpointError
from maskset.evaluation.cells import cell_accuracy
from maskset.evaluation.evaluate import detections_in
from maskset.evaluation.overlaps import overlaps

SAMPLE = Path(__file__).parent / "sample" / "nuclei"  # images that it was not trained on
FILE = BUNDLED / "nuclei.safetensors"


def test_it_detects_nuclei_that_it_was_not_trained_on():
    model, data = load("nuclei"), open_data(SAMPLE, "val")
    images = [overlaps(data, index, found) for index, found in detections_in(model, data, range(len(data)), 400)]
    assert cell_accuracy(images, 0.5)[0.5] > 0.7
    detections = maskset.predict(model, BUNDLED / "nuclei.png")
    assert 60 < len(detections) < 110
    assert set(detections.names) == {"nucleus"}


def test_it_is_small_and_says_where_it_comes_from():
    assert FILE.stat().st_size < 12e6
    metadata = read_metadata(FILE)
    assert metadata.license == "Apache-2.0"
    assert metadata.source.endswith("see maskset/models/nuclei.md")
    assert (BUNDLED / "nuclei.md").is_file()
    recipe = maskset.recipes.sextant_nuclei()
    assert replace(metadata.recipe, model=replace(metadata.recipe.model, num_classes=recipe.model.num_classes)) == recipe


def test_a_run_folder_comes_before_a_model_in_the_package_and_a_data_folder_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find("nuclei") == FILE
    (tmp_path / "nuclei" / "images").mkdir(parents=True)  # a data folder
    assert find("nuclei") == FILE
    with pytest.raises(CheckpointError, match="the folder nuclei/images does not contain"):
        find("nuclei/images")
    (tmp_path / "nuclei" / "last.safetensors").touch()
    assert find("nuclei") == Path("nuclei/last.safetensors")


def test_its_name_is_one_of_a_model_and_a_mistyped_one_is_answered_with_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_model("nuclei")
    assert not is_model("nucleus")
    assert [*bundled_models()] == ["nuclei"]
    with pytest.raises(CheckpointError, match="there is no checkpoint nucleii. Did you mean nuclei?"):
        find("nucleii")
