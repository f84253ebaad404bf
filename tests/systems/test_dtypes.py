"""Models converted to another floating-point type, as users do to save memory, predict."""

import copy
from functools import cache

import pytest
import torch
from tiny import TINY, shapes

import maskset
from maskset.instances import Category
from maskset.systems import System

CATEGORIES = tuple(Category(name, i) for i, name in enumerate(("a", "b", "c"), 1))
PIXELS = torch.randint(256, (3, 64, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@cache
def float32_model(name: str) -> System:
    torch.manual_seed(0)
    model = maskset.build(TINY[name], CATEGORIES)
    model.prepare(objects for _, objects in shapes(8))
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", TINY)
def test_a_model_of_another_dtype_predicts(name, dtype):
    model = copy.deepcopy(float32_model(name)).to(dtype)
    detections = maskset.predict(model, PIXELS.permute(1, 2, 0).numpy(), threshold=0.0)
    assert len(detections) > 0
    for values in (detections.scores, detections.boxes):
        assert values.dtype in (torch.float32, dtype if dtype == torch.float64 else torch.float32)
        assert values.isfinite().all()
