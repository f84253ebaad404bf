"""The examples run, on generated data."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from maskset.data import shapes

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda file: file.name)
def test_an_example_is_short_and_tested(file):
    assert len(file.read_text().splitlines()) < 60
    assert f'example("{file.stem}")' in Path(__file__).read_text()


def test_training_on_your_data_leaves_a_model(tmp_path):
    data = shapes.write(tmp_path / "data", {"train": 16, "val": 2}, size=(64, 64))
    metrics = example("train_on_your_data").main(str(data), str(tmp_path / "run"), epochs=1)
    assert metrics.images == 2
    assert (tmp_path / "run" / "last.safetensors").exists()


def test_more_numbers_keep_more_of_a_mask():
    means = example("decode_masks").main("shapes", images=3)
    assert means[16] < means[64] < means[256]
    assert means[256] > 0.95


def test_predictions_are_written_as_coco_and_as_pictures(tmp_path, untrained):
    data = shapes.write(tmp_path / "data", {"val": 2}, size=(64, 64))
    count = example("predict_and_draw").main(str(untrained), str(data / "val"), str(tmp_path / "out"), threshold=0.0)
    assert count > 0
    assert len(list((tmp_path / "out").glob("*.json"))) == 2
    assert len(list((tmp_path / "out").glob("*.jpg"))) == 2
