"""The core of multi-scale deformable attention, without its projections, against transformers' function.

8 heads of 32 channels, 4 levels, 4 points. Encoder: every cell of an image of 640 x 800 pixels is a query that looks around
itself, 1 to 4 cells away in 8 directions with a standard deviation of 1. Decoder: 300 queries anywhere. On a GPU 16 images of
800 x 1066 pixels, values in bfloat16 and locations in float32, beside a direct CUDA kernel of one thread for each number.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.measure import Implementation, in_turn, peaks, require
from benchmarks.report import Report
from maskset.kernels.attention import FUSED, deformable_attention, implementations, using

HEADS, WIDTH, POINTS, STRIDES = 8, 32, 4, (8, 16, 32, 64)
BASELINE = "transformers"
Attention = Callable[["Sample"], Tensor]


@dataclass(frozen=True)
class Sample:
    """The inputs of one attention, and a gradient of its output."""

    value: Float[Tensor, "B S M D"]
    shapes: tuple[tuple[int, int], ...]
    locations: Float[Tensor, "B Q M L P 2"]
    weights: Float[Tensor, "B Q M L P"]
    gradient: Float[Tensor, "B Q M*D"]

    def cast(self, dtype: torch.dtype) -> "Sample":
        """Return the sample in another precision."""
        values = {name: getattr(self, name).to(dtype) for name in ("value", "locations", "weights", "gradient")}
        return replace(self, **values)


def run(report: Report, quick: bool) -> None:
    """Measure every implementation that works on this machine."""
    reasons = implementations()
    for name, reason in reasons.items():
        report.note(f"Implementation {name}: {'works here' if reason is None else reason}.")
    require("transformers")
    gpu = torch.cuda.is_available()
    device, size, images = ("cuda", (800, 1066), 16) if gpu else ("cpu", (640, 800), 1)
    usable = [name for name, reason in reasons.items() if reason is None and FUSED.get(name, device) == device]
    attentions = {BASELINE: transformers_attention, **{f"maskset, {name}": partial(ours, name) for name in usable}}
    if quick:
        size, images = (64, 96), 1
    if gpu:
        from benchmarks import cuda

        attentions |= cuda.attentions(report)
    for place, queries in (("encoder", None), ("decoder", 300)):
        measure(report, place, sample(size, images, queries, device), attentions, seconds=0 if quick else 25)
    if gpu:
        cuda.bandwidth(
            report,
            sample(size, images, None, device),
            [implementation for implementation in attentions if implementation != BASELINE],
        )
        return gpu_targets(report)
    cpu_targets(report)


def ours(name: str, sample: Sample) -> Tensor:
    """Return maskset's attention in one implementation."""
    with using(name):
        return deformable_attention(sample.value, sample.shapes, sample.locations, sample.weights)


def transformers_attention(sample: Sample) -> Tensor:
    """Return the attention of DeformableDetr and the other models of transformers that have it."""
    from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

    shapes = torch.tensor(sample.shapes, device=sample.value.device)
    starts = torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])
    attention = MultiScaleDeformableAttention()
    return attention(sample.value, shapes, list(sample.shapes), starts, sample.locations, sample.weights, 64)


def sample(size: tuple[int, int], images: int, queries: int | None, device: str) -> Sample:
    """Return the inputs of an encoder, or of a decoder with so many queries, for images of `size` (height, width)."""
    generator = torch.Generator().manual_seed(0)
    shapes = tuple((math.ceil(size[0] / stride), math.ceil(size[1] / stride)) for stride in STRIDES)
    total = sum(height * width for height, width in shapes)
    centers = cells(shapes) if queries is None else torch.rand(queries, 2, generator=generator)
    angle = torch.arange(HEADS) * (2 * math.pi / HEADS)
    direction = torch.stack([angle.cos(), angle.sin()], -1)
    direction = (direction / direction.abs().amax(-1, keepdim=True))[:, None, None] * torch.arange(1, POINTS + 1)[:, None]
    many = (images, len(centers), HEADS, len(STRIDES), POINTS)
    offsets = direction + torch.randn(*many, 2, generator=generator)
    wide = torch.tensor([(width, height) for height, width in shapes])[:, None]
    places = centers[:, None, None, None] * wide - 0.5 + offsets  # in cells
    # The gradient jumps where a sampling point meets the center of a cell, so no point may be closer than rounding.
    near = (places - places.round()).abs() < 0.01
    locations = (torch.where(near, places.round() + 0.02, places) + 0.5) / wide
    weights = torch.randn(*many, generator=generator).flatten(3).softmax(-1).view(many)
    value = torch.randn(images, total, HEADS, WIDTH, generator=generator)
    gradient = torch.randn(images, len(centers), HEADS * WIDTH, generator=generator)
    return Sample(value.to(device), shapes, locations.to(device), weights.to(device), gradient.to(device))


def cells(shapes: tuple[tuple[int, int], ...]) -> Float[Tensor, "S 2"]:
    """Return the center x, y of every cell of all levels, as fractions."""
    centers = []
    for height, width in shapes:
        y, x = (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width
        centers.append(torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flip(-1).view(-1, 2))
    return torch.cat(centers)


def measure(report: Report, place: str, sample: Sample, attentions: dict[str, Attention], seconds: float) -> None:
    """Compare the attentions in inference and in training."""
    exact = with_gradients(transformers_attention, sample.cast(torch.float64))
    for name, attention in attentions.items():
        found = with_gradients(attention, sample)
        each = [(one - other).abs().max() / other.abs().max() for one, other in zip(found, exact, strict=True)]
        apart = torch.stack(each).max().item()  # NaN if any is
        what = f"{place}, output and gradients: {name} and {BASELINE} in float64, relative to the greatest value"
        report.agree(what, apart, 1e-4)
    given = replace(sample, value=sample.value.bfloat16()) if sample.value.is_cuda else sample
    samples = {
        name: given if name == "maskset, triton" else sample for name in attentions
    }  # the others need inputs of one precision
    implementations: dict[str, Implementation] = {
        name: partial(attention, samples[name]) for name, attention in attentions.items()
    }
    with torch.no_grad():
        report.compare(case(place, "inference", sample), BASELINE, in_turn(implementations, seconds), peaks(implementations))
    implementations = {name: partial(with_gradients, attention, samples[name]) for name, attention in attentions.items()}
    report.compare(
        case(place, "forward and backward", sample), BASELINE, in_turn(implementations, seconds), peaks(implementations)
    )


def with_gradients(attention: Attention, sample: Sample) -> tuple[Tensor, ...]:
    """Return the output, and the gradients of value, locations and weights."""
    value, locations, weights = (one.detach().requires_grad_() for one in (sample.value, sample.locations, sample.weights))
    output = attention(replace(sample, value=value, locations=locations, weights=weights))
    gradient = sample.gradient.to(output.dtype)
    return output.detach(), *torch.autograd.grad(output, [value, locations, weights], gradient)


def case(place: str, what: str, sample: Sample) -> str:
    """Return the name of a case."""
    images, queries = sample.locations.shape[:2]
    return f"{place}, {what}: {images} x {queries:,} queries"


def cpu_targets(report: Report) -> None:
    """Add the targets, which differ between one thread and several."""
    inference, training = (next(f.case for f in report.figures if what in f.case) for what in ("inference", "backward"))
    missing = "" if report.figure(inference, "maskset, c") else "no C kernel here"
    required = (12, 10) if report.threads == 1 else (8, 8)
    threads = f"{report.threads} thread{'s' * (report.threads > 1)}"
    compared = "of the C kernel over transformers: encoder attention"
    for step, case, least in (("inference", inference, required[0]), ("forward and backward", training, required[1])):
        report.target(f"speed-up {compared}, {step}, {threads}", least, report.speedup(case, "maskset, c"), missing)
    if report.threads > 1:
        return
    for step, case in (("inference", inference), ("forward and backward", training)):
        report.target(f"memory saving {compared}, {step}, {threads}", 10, report.memory_saving(case, "maskset, c"), missing)
    report.target(
        f"speed-up of embedding_bag over transformers: encoder attention, inference, {threads}",
        2.5,
        report.speedup(inference, "maskset, bag"),
    )


def gpu_targets(report: Report) -> None:
    """Add the targets, which are times, as the ratio of the allowed time to the measured one."""
    for what, required in (("inference", 3.0), ("forward and backward", 15.0)):
        found = next((f for f in report.figures if f"encoder, {what}" in f.case and f.implementation == "maskset, triton"), None)
        measured = None if found is None or not found.milliseconds else required / found.milliseconds
        report.target(f"Triton kernel, relative to a budget of {required:g} ms: encoder attention, {what}", 1, measured)
