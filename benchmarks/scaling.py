"""What SOLQ with ResNet-50 costs as its input grows: image size, slots and objects, in float32, one image.

Inference is the network and its results for images of 3:4; the loss is matching, loss and its gradient for the predictions of 6
layers, given 91 classes, without the network. Memory is that of tensors above weights and input.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.inference import noise, results
from benchmarks.measure import Implementation, in_turn, peaks, require
from benchmarks.report import Report
from benchmarks.training import example
from maskset import recipes
from maskset.files import atomic_write
from maskset.instances import Instances
from maskset.structures import ImageBatch, ModelOutput, SlotPredictions
from maskset.systems import System, build
from maskset.systems.solq import Solq

SIZES, SLOTS, OBJECTS = (
    (480, 800, 1120, 1600),
    (100, 300, 600, 1000),
    (1, 10, 100, 300, 1000),
)  # sizes: the short side, pixels
USUAL = {"size": 480, "slots": 300, "objects": 50}
_TICKS = 5


def run(report: Report, quick: bool) -> None:
    """Measure each curve; the other sizes keep their usual values."""
    require("matplotlib")
    sizes, slots, objects = ((64, 96), (10, 20), (1, 5)) if quick else (SIZES, SLOTS, OBJECTS)
    usual = {"size": 64, "slots": 10, "objects": 5} if quick else USUAL
    model, seconds = solq(usual["slots"], quick), 0 if quick else 10
    # The largest image takes half a minute: each size is timed once, after the call that counted its memory.
    curve(report, "inference, short side of the image in pixels", {size: inference(model, size) for size in sizes}, seconds=0)
    curve(report, "inference, slots", {count: inference(solq(count, quick), usual["size"]) for count in slots}, seconds)
    curve(report, "loss, slots", {count: loss(model, count, usual["objects"]) for count in slots}, seconds)
    curve(report, f"loss of {max(slots):,} slots, objects", {count: loss(model, max(slots), count) for count in objects}, seconds)


def curve(report: Report, case: str, implementations: Mapping[int, Implementation], seconds: float) -> None:
    """Add the cost at each value."""
    named = {str(value): implementation for value, implementation in implementations.items()}
    memory = peaks(named)
    report.compare(case, None, in_turn(named, seconds), memory)


def solq(slots: int, quick: bool) -> Solq:
    """Return SOLQ with this number of slots."""
    torch.manual_seed(0)
    config = recipes.get("solq-tiny" if quick else "solq-r50").model
    model = build(replace(config, num_queries=slots, num_classes=91)).eval()
    assert isinstance(model, Solq)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def inference(model: System, size: int) -> Implementation:
    """Return the computation of an image's results."""
    pixels = noise(1, (size, size * 4 // 3)).to(next(model.parameters()).device)
    return partial(results, "maskset solq", model, pixels)


def loss(model: Solq, slots: int, objects: int) -> Implementation:
    """Return the computation of the loss's gradient for random predictions."""
    images, found = example(model, (480, 640), objects, 1)
    device, generator = next(model.parameters()).device, torch.Generator().manual_seed(0)

    def random(width: int) -> Tensor:
        return torch.rand(1, slots, width, generator=generator).to(device)

    layers = [(random(91) - 5, random(model.config.code_length), random(4) * 0.5 + 0.1) for _ in range(6)]
    return partial(gradient, model, layers, images.to(device), [one.to(device) for one in found])


def gradient(
    model: System, layers: Iterable[tuple[Tensor, ...]], images: ImageBatch, found: list[Instances]
) -> list[Tensor | None]:
    """Return the gradient of the loss for every prediction."""
    given = [[one.detach().requires_grad_() for one in layer] for layer in layers]
    terms = model.loss(ModelOutput([SlotPredictions(*layer) for layer in given]), images, found)
    total = torch.stack(list(terms.values())).sum()
    return list(torch.autograd.grad(total, [one for layer in given for one in layer], allow_unused=True))


def draw(result: Mapping[str, Any], folder: Path) -> Path:
    """Draw time and memory of all curves, and return the file's path. The same figures give the same file."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams |= {"svg.hashsalt": "maskset", "svg.fonttype": "none"}
    from matplotlib import pyplot

    cases = list(dict.fromkeys(figure["case"] for figure in result["figures"]))
    sheet, panes = pyplot.subplots(2, len(cases), figsize=(3.1 * len(cases), 5), layout="constrained")
    for column, case in enumerate(cases):
        points = [figure for figure in result["figures"] if figure["case"] == case]
        for pane, (name, label) in zip(panes[:, column], (("milliseconds", "ms"), ("peak_mib", "MiB")), strict=True):
            values = [int(point["implementation"]) for point in points]
            pane.plot(values, [point[name] for point in points], marker="o", color="#0072b2")
            pane.set_ylim(bottom=0)
            pane.grid(alpha=0.3)
            pane.set_ylabel(label)
            pane.locator_params(nbins=_TICKS)
        panes[0, column].set_title(case.rpartition(", ")[0], fontsize=10)
        panes[1, column].set_xlabel(case.rpartition(", ")[2])
    path = folder / "scaling.svg"
    with atomic_write(path) as part:
        sheet.savefig(part, format="svg", metadata={"Date": None})
    pyplot.close(sheet)
    return path
