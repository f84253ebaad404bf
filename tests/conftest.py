"""What several test files need."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # the tests' tensors are small: more threads only wait for each other


@pytest.fixture(autouse=True, scope="module")
def _free_cached_results(request: pytest.FixtureRequest) -> Iterator[None]:
    """Free the full-size models and outputs that a module's `functools.cache` functions hold, after its last test."""
    yield
    for value in vars(request.module).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()


@pytest.fixture(scope="session")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a tiny model with random weights that knows the classes of the generated shapes."""
    from tiny import TINY

    from maskset.checkpoint import save
    from maskset.data.shapes import CATEGORIES
    from maskset.recipe import Recipe
    from maskset.systems import build

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("untrained") / "tiny.safetensors"
    save(build(TINY["solq"], CATEGORIES), Recipe(model=TINY["solq"]), path, license="Apache-2.0")
    return path
