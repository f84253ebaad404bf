"""What several test files need."""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # the tests' tensors are small: more threads only wait for each other


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
