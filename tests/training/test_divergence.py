"""What is kept when a loss is not finite."""

import json

import pytest
import torch
from tiny import shapes

from maskset.structures import ImageBatch
from maskset.training.divergence import save_diverged_batch
from maskset.training.step import NotFinite


@pytest.mark.parametrize(("process", "name"), [(0, "diverged"), (3, "diverged_3")])
def test_every_process_keeps_its_batch_in_a_folder_of_its_own(tmp_path, process, name):
    pixels, objects = shapes(1)[0]
    problem = NotFinite("loss is nan.", {"loss": torch.tensor(torch.nan)}, (ImageBatch.from_images([pixels]), [objects]), 0)
    error = save_diverged_batch(tmp_path, 7, {"rest": 1e-3}, problem, ["a.png"], process)
    assert "diverged in step 7: loss is nan." in str(error)
    assert sorted(file.name for file in (tmp_path / name).iterdir()) == ["batch.json", "batch.safetensors"]
    assert [folder.name for folder in tmp_path.iterdir()] == [name]
    assert json.loads((tmp_path / name / "batch.json").read_text())["terms"] == {"loss": "nan"}
