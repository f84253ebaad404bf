"""A training step: forward, loss and backward, without the optimizer; its memory and its time against the straightforward way.

Straightforward: deformable attention by grid_sample, SOIT's instance-aware transformer step by step in PyTorch, and the masks
of all decoder layers drawn at once and kept for one backward pass. Memory: ResNet-50 models of SOIT and ISDA, one image of 800
x 1066 pixels with 50 objects, mask losses on all 6 decoder layers, float32; each step in a process of its own: the greatest
while it computes, less what it had with libraries, weights and image; with `train.checkpoint_activations` layers are computed
twice. Time: the small recipes on 4 images of 256 x 256 pixels.
On a GPU also all five systems with ResNet-50 in bfloat16, against transformers' Mask2Former and torchvision's Mask R-CNN.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks import inference
from benchmarks.measure import Implementation, in_new_process, in_turn, peaks, require, resident
from benchmarks.report import Report
from maskset import recipes
from maskset.data.shapes import CATEGORIES, ShapesDataset
from maskset.instances import Instances, Masks
from maskset.kernels import library
from maskset.kernels.attention import ATTENTION_ENV
from maskset.layers.blocks import recompute
from maskset.layers.transformer import DeformableAttention
from maskset.structures import ImageBatch
from maskset.systems import System, build, isda, soit

BASELINE, OURS, FRUGAL = "straightforward", "maskset", "maskset, train.checkpoint_activations"
Batch = tuple[ImageBatch, list[Instances]]


def run(report: Report, quick: bool) -> None:
    """Measure memory, then time."""
    if torch.cuda.is_available():
        require("transformers")
    for name in ("soit",) if quick else ("soit", "isda"):
        memory(report, name, quick)
    for name in ("solq", "soit", "isda"):
        seconds(report, name, quick)
    if torch.cuda.is_available():
        throughput(report, images=16, size=(800, 1066))


@contextmanager
def straightforward() -> Iterator[None]:
    """Compute training steps in the straightforward way inside a `with` block."""
    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, {ATTENTION_ENV: "reference", library.NATIVE_ENV: "off"}))
        for module in (soit, isda):
            stack.enter_context(patch.object(module, "chunked_loss", all_at_once))
        yield


def all_at_once(values: Callable, pieces: Sequence[Tensor], shared: Tensor) -> Tensor:
    """Return the result of `maskset.losses.chunked_loss`, computed at once."""
    return torch.stack([values(i, piece, shared) for i, piece in enumerate(pieces)])


@dataclass(frozen=True)
class Cost:
    """The cost of one step.

    Attributes:
        before: memory of the process before it, MiB.
        peak: at most, MiB.
        seconds: of the step, once.
        norm: of the gradient.
    """

    before: float
    peak: float
    seconds: float
    norm: float


def memory(report: Report, name: str, quick: bool) -> None:
    """Compare the memory of the implementations of a system."""
    costs = {
        implementation: in_new_process(step_alone, name, implementation, quick) for implementation in (BASELINE, OURS, FRUGAL)
    }
    norm = costs[BASELINE].norm
    for implementation in (OURS, FRUGAL):
        report.agree(
            f"{name}, {implementation}: norm of the gradient, relative", abs(costs[implementation].norm - norm) / norm, 1e-3
        )
    case = f"memory of a training step, {name}"
    report.compare(case, BASELINE, {}, {implementation: cost.peak - cost.before for implementation, cost in costs.items()})
    for implementation, cost in costs.items():
        text = f"{cost.before:,.0f} MiB before, {cost.peak:,.0f} MiB at most, {cost.seconds:.1f} s (once)"
        report.note(f"Training step of {name}, {implementation}: {text}.")
    if name == "soit":
        report.target(
            f"memory saving over the {BASELINE} implementation: training step of SOIT, layers recomputed",
            3,
            report.memory_saving(case, FRUGAL),
        )


def step_alone(name: str, implementation: str, quick: bool) -> Cost:
    """Return the cost of one step, the first in this process."""
    size, objects = ((96, 128), 5) if quick else ((800, 1066), 50)
    torch.manual_seed(0)
    config = recipes.get(f"{name}-{'tiny' if quick else 'r50'}").model
    model = off_center(build(config).train()).to(device())
    if implementation == FRUGAL:
        recompute(model)
    batch = on_device(example(model, size, objects, images=1))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with straightforward() if implementation == BASELINE else ExitStack():
        before, _ = resident()
        start = time.perf_counter()
        gradients = torch.autograd.grad(total(model, batch), parameters, allow_unused=True)
        taken = time.perf_counter() - start
    norm = torch.stack([gradient.norm() for gradient in gradients if gradient is not None]).norm().item()
    return Cost(before, resident()[1], taken, norm)


def device() -> str:
    """Return the device to compute on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def on_device(batch: Batch) -> Batch:
    """Return the batch on the device."""
    return batch[0].to(device()), [one.to(device()) for one in batch[1]]


def off_center(model: System) -> System:
    """Return the model with other offsets: untrained ones end on the centers of cells, where their gradient jumps."""
    for module in model.modules():
        if isinstance(module, DeformableAttention):
            nn.init.normal_(module.sampling_offsets.weight, std=0.02)
    return model


def example(model: System, size: tuple[int, int], objects: int, images: int) -> Batch:
    """Return images of noise, and as objects discs of many sizes."""
    generator = torch.Generator().manual_seed(0)
    height, width = size
    y, x = torch.arange(height)[:, None], torch.arange(width)[None]
    pixels, found = [], []
    for _ in range(images):
        places = torch.rand(objects, 3, generator=generator)
        discs = [torch.hypot(y - height * cy, x - width * cx) < height * (0.025 + 0.16 * radius) for cy, cx, radius in places]
        masks = Masks.from_dense(torch.stack(discs))
        found.append(Instances(torch.arange(objects) % model.config.num_classes, masks.boxes(), masks))
        pixels.append(torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator))
    return ImageBatch.from_images(pixels, model.input.divisor).normalized(model.input), found


def total(model: System, batch: Batch) -> Tensor:
    """Return the loss."""
    images, found = batch
    return torch.stack(list(model.loss(model(images), images, found).values())).sum()


def seconds(report: Report, name: str, quick: bool) -> None:
    """Compare the time of both implementations with a system's small recipe."""
    torch.manual_seed(0)
    side, count = (64, 1) if quick else (256, 4)
    config = recipes.get(f"{name}-{'tiny' if quick else 'small'}").model
    model = build(replace(config, num_classes=len(CATEGORIES)), CATEGORIES).train().to(device())
    data = ShapesDataset("train", count, (side, side))
    examples = [data.read(i) for i in range(count)]
    images = ImageBatch.from_images([pixels for pixels, _ in examples], model.input.divisor).normalized(model.input)
    batch = on_device((images, [found for _, found in examples]))
    with straightforward():
        expected = total(model, batch).item()
    report.agree(f"{name}: loss of the small model, relative", abs(total(model, batch).item() - expected) / expected, 1e-3)

    def plain() -> None:
        with straightforward():
            step(model, batch)

    case = f"training step of {name}-small, {count} images of {side} x {side}"
    report.compare(case, BASELINE, in_turn({BASELINE: plain, OURS: partial(step, model, batch)}, 0 if quick else 12))


def step(model: System, batch: Batch) -> None:
    """Compute gradients and discard them."""
    total(model, batch).backward()
    model.zero_grad()


def throughput(report: Report, images: int, size: tuple[int, int], quick: bool = False) -> None:
    """Compare steps of whole models with ResNet-50 in bfloat16, 10 objects in each image."""
    implementations: dict[str, Implementation] = {}
    for name in inference.MODELS:
        if name != inference.DDETR:
            implementations[name] = whole_step(name, inference.MODELS[name](quick).train().to(device()), images, size)
    case = f"training step, {images} images of {size[0]} x {size[1]}, bfloat16"
    report.compare(case, inference.M2F, in_turn(implementations, 0 if quick else 60), peaks(implementations))
    for name in implementations:
        found = report.figure(case, name)
        if found and found.milliseconds:
            report.note(f"{name}: {1000 * images / found.milliseconds:.1f} images/s in training.")


def whole_step(name: str, model: nn.Module, images: int, size: tuple[int, int]) -> Implementation:
    """Return a forward and backward pass of a model."""
    some = build(recipes.get("solq-tiny").model)
    pixels, found = on_device(example(some, size, 10, images))
    dense = [one.masks.dense() for one in found]

    def loss() -> Tensor:
        if isinstance(model, System):
            return total(model, (ImageBatch.from_images(list(pixels.pixels), model.input.divisor), found))
        if name == inference.M2F:
            labels = [one.labels for one in found]
            return model(pixels.pixels, mask_labels=[masks.float() for masks in dense], class_labels=labels).loss
        targets = [
            {"boxes": one.boxes, "labels": one.labels + 1, "masks": masks.byte()} for one, masks in zip(found, dense, strict=True)
        ]
        return torch.stack(list(model(list(pixels.pixels), targets).values())).sum()

    def call() -> None:
        with torch.autocast(device(), torch.bfloat16):
            value = loss()
        value.backward()
        model.zero_grad()

    return call
