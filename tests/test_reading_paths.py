"""How many files a reader opens to follow a prediction and an optimizer step: the files whose functions run."""

import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tiny import TINY, batch, shapes

import maskset
from maskset.data.shapes import CATEGORIES
from maskset.systems import build

PACKAGE = Path(maskset.__file__).parent


def files_run(function: Callable[[], object]) -> list[str]:
    """Return the package's files in which a function runs during the call, in this thread and in new ones."""
    files: set[str] = set()

    def record(frame, event, _):
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(str(PACKAGE)) and frame.f_code.co_name != "<module>":
            files.add(str(Path(name).relative_to(PACKAGE)))

    threading.setprofile(record)
    sys.setprofile(record)
    try:
        function()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    print(f"\n{len(files)} files:", *sorted(files), sep="\n  ")  # pytest -s shows it
    return sorted(files)


def test_a_prediction_runs_functions_of_at_most_21_files():
    model, predict = build(TINY["solq"], CATEGORIES).eval(), maskset.predict
    image = np.zeros((64, 80, 3), np.uint8)
    files = files_run(lambda: predict(model, image, threshold=0.0))
    assert len(files) <= 21, files


def test_an_optimizer_step_runs_functions_of_at_most_18_files():
    model = build(TINY["solq"], CATEGORIES).train()
    images, targets = batch(shapes(2), TINY["solq"])
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        sum(model.loss(model(images), images, targets).values()).backward()
        optimizer.step()

    files = files_run(step)
    assert len(files) <= 18, files
