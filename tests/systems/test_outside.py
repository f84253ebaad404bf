"""A system that is defined outside of the package, here, is built, trained, saved, loaded and used like the others."""

import json
import subprocess
import sys
from dataclasses import replace
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from runs import data
from torch import Tensor, nn

import maskset
from maskset.checkpoint import read_metadata
from maskset.config import config, from_dict, setting, to_dict
from maskset.errors import CheckpointError, ConfigError
from maskset.instances import Instances, Masks
from maskset.recipe import DataConfig, Recipe, TrainConfig
from maskset.structures import ImageBatch, ModelOutput, SlotPredictions
from maskset.systems import InputConfig, System, SystemConfig

SIDE = 16  # of a mask of the whole canvas, cells


@config
class CellsConfig(SystemConfig):
    """Settings of a small system: each cell of a grid reports the object whose box has its center there."""

    system: Literal["cells"] = "cells"
    input: InputConfig = InputConfig(short_side=48, long_side=96, divisor=16)
    width: int = setting(16, "channels")
    grid: int = setting(4, "cells along each side")

    def build(self, categories) -> "Cells":
        return Cells(self, categories)


class Cells(System):
    def __init__(self, config: CellsConfig, categories) -> None:
        super().__init__(config, categories, num_slots=config.grid**2)
        layers = [nn.Sequential(nn.Conv2d(c, config.width, 3, 2, 1), nn.ReLU()) for c in (3, config.width, config.width)]
        self.backbone = nn.Sequential(*layers)
        self.class_head = nn.Linear(config.width, config.num_classes)
        self.mask_head = nn.Linear(config.width, SIDE**2)

    def forward(self, images: ImageBatch) -> ModelOutput:
        slots = F.adaptive_avg_pool2d(self.backbone(images.pixels), self.config.grid).flatten(2).transpose(1, 2)
        return ModelOutput([SlotPredictions(self.class_head(slots), self.mask_head(slots))])

    def loss(self, output: ModelOutput, images: ImageBatch, targets) -> dict[str, Tensor]:
        (layer,) = output.layers
        classes, masks = torch.zeros_like(layer.class_logits), layer.mask_params.new_zeros(())
        for image, own in enumerate(targets):
            for label, box, mask in zip(own.labels, own.boxes, own.masks.dense(), strict=True):
                x, y = ((box[:2] + box[2:]) / 2 / torch.tensor(mask.shape).flip(0) * self.config.grid).long().tolist()
                slot = y * self.config.grid + x
                classes[image, slot, label] = 1
                wanted = F.interpolate(mask[None, None].float(), (SIDE, SIDE)).flatten()
                masks = masks + F.binary_cross_entropy_with_logits(layer.mask_params[image, slot], wanted)
        return {"class": F.binary_cross_entropy_with_logits(layer.class_logits, classes), "mask": masks}

    @torch.no_grad()
    def postprocess(self, output, images, sizes, limit=100, threshold=0.0) -> list[Instances]:
        detections = []
        for logits, codes, size in zip(output.layers[0].class_logits, output.layers[0].mask_params, sizes, strict=True):
            scores, labels = logits.sigmoid().max(1)
            best = scores.argsort(descending=True)[:limit]
            best = best[scores[best] >= threshold]
            drawn = F.interpolate(codes[best].view(-1, 1, SIDE, SIDE), size)[:, 0] > 0
            masks = Masks.from_dense(drawn)
            detections.append(Instances(labels[best], masks.boxes(), masks, scores[best], self.categories))
        return detections


RECIPE = Recipe(
    model=CellsConfig(),
    data=DataConfig(augmentation="flip", short_sides=(48,), long_side=96, workers=0),
    train=TrainConfig(epochs=1, batch_size=2, reference_batch_size=2, log_every=1),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the folder of a run of five steps."""
    folder = tmp_path_factory.mktemp("outside") / "run"
    maskset.train(RECIPE, data(), folder)
    return folder


def test_it_is_built_with_the_categories_it_is_given():
    model = maskset.build(CellsConfig(num_classes=2))
    assert isinstance(model, Cells)
    assert [category.name for category in model.categories] == ["class 0", "class 1"]
    assert model.num_slots == 16


def test_its_recipe_survives_json_and_its_settings_are_checked():
    values = json.loads(json.dumps(to_dict(RECIPE)))
    assert from_dict(Recipe, values, "here") == RECIPE
    with pytest.raises(ConfigError, match=r"there is no setting 'model\.gird'; did you mean 'grid'"):
        from_dict(Recipe, {"model": {"system": "cells", "gird": 3}}, "here")
    with pytest.raises(ConfigError, match=r"model\.num_classes must be at least 1, got 0"):
        CellsConfig(num_classes=0)


def test_it_trains_and_its_run_can_be_loaded_and_used(run):
    model = maskset.load(run)
    assert isinstance(model, Cells)
    assert model.config == replace(CellsConfig(), num_classes=len(model.categories))
    (image,) = maskset.predict(model, [torch.zeros(48, 64, 3, dtype=torch.uint8).numpy()], threshold=0.0)
    assert len(image) == 16
    assert maskset.evaluate(model, data(), split="val", progress=False).images == 2


def test_its_run_can_be_resumed(run):
    maskset.train(RECIPE, data(), run, resume=True)
    assert read_metadata(run / "last.safetensors").recipe.model.system == "cells"


def test_fine_tuning_takes_its_weights(run, tmp_path):
    maskset.train(replace(RECIPE, train=replace(RECIPE.train, steps=1)), data(), tmp_path / "tuned", init=run)
    assert (tmp_path / "tuned" / "best.safetensors").is_file()


def test_without_importing_it_the_error_lists_the_known_systems(run):
    program = f"import maskset\ntry: maskset.load({str(run)!r})\nexcept Exception as error: print(type(error).__name__, error)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(CheckpointError.__name__)
    assert "must be one of" in done.stdout
    assert "'cells': import the module that defines it first" in done.stdout


def test_a_config_class_without_a_name_or_with_that_of_another_system_is_refused():
    with pytest.raises(TypeError, match="Nameless needs the name of its system"):

        class Nameless(CellsConfig):
            pass

    with pytest.raises(TypeError, match=r"the name 'solq' is taken by maskset\.systems\.solq\.SolqConfig"):

        class Impostor(SystemConfig):
            system: str = "solq"


@pytest.mark.parametrize("rubbish", [None, "solq", {"system": "solq"}, CellsConfig, RECIPE])
def test_build_refuses_other_objects_than_settings(rubbish):
    with pytest.raises(ConfigError, match="build takes the settings of a system"):
        maskset.build.__wrapped__(rubbish)  # without the shape checks of the tests, which refuse it as well
