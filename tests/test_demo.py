"""The demo, with the training left out."""

import shutil
from pathlib import Path

import pytest

from maskset import demo
from maskset.errors import Terminated
from maskset.evaluation.metrics import Metrics


def test_the_demo_measures_draws_and_says_what_to_type_next(tmp_path, monkeypatch, capsys, untrained):
    asked = []

    def train(recipe: str, data: str, run: Path, *, resume: bool) -> None:
        asked.append((recipe, data, resume))
        run.mkdir(parents=True, exist_ok=True)
        shutil.copy(untrained, run / "best.safetensors")
        (run / "recipe.json").touch()

    monkeypatch.setattr(demo, "train", train)
    measured = Metrics(max_detections=100, images=200, objects=500)
    monkeypatch.setattr(demo, "evaluate", lambda run, data, *, split: {("shapes:", "test"): measured}[data, split])
    assert demo.demo(tmp_path / "demo") == measured
    output = capsys.readouterr().out
    assert f"nuclei in a microscope image: {tmp_path}/demo/nuclei/drawings/nuclei.jpg" in output
    assert (tmp_path / "demo" / "nuclei" / "drawings" / "nuclei.jpg").exists()
    assert str(measured) in output
    assert f"maskset predict {tmp_path}/demo/run" in output
    assert len(list((tmp_path / "demo" / "predictions" / "drawings").iterdir())) == 12

    demo.demo(tmp_path / "demo")  # once more: the run is there
    assert asked == [("sextant-tiny", "shapes:", False), ("sextant-tiny", "shapes:", True)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, Terminated])
def test_a_stopped_demo_says_that_it_can_be_continued(tmp_path, monkeypatch, error):
    def stop(*arguments, **options):
        raise error("the same command with --resume continues the run")

    monkeypatch.setattr(demo, "train", stop)
    with pytest.raises(error, match="^the same command continues the demo"):
        demo.demo(tmp_path)
