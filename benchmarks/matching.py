"""The cost of matching slots with objects (focal, L1 and generalized IoU) for all decoder layers, against DETR's way.

16 images of 7 to 50 objects, 459 in all, 300 slots, 91 classes, 6 layers. DETR's way computes, layer by layer, the cost of every
slot of the batch with every object of the batch, and then uses those of the same image. Solving the assignment is told apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchvision.ops import generalized_box_iou

from benchmarks.measure import in_turn, peaks
from benchmarks.report import Report
from maskset import boxes as box_ops
from maskset.detection import focal_cost, giou_cost, l1_cost, match, pad

CASE, BASELINE = "cost matrices of 6 layers", "all pairs, as DETR"
FOR_CLASS, FOR_L1, FOR_GIOU = 2.0, 5.0, 2.0


@dataclass(frozen=True)
class Problem:
    """Predictions of all layers, and the objects of each image."""

    logits: Float[Tensor, "L B N K"]
    boxes: Float[Tensor, "L B N 4"]
    labels: Sequence[Int[Tensor, "_"]]
    targets: Sequence[Float[Tensor, "_ 4"]]

    @property
    def counts(self) -> list[int]:
        """Number of objects in each image."""
        return [len(label) for label in self.labels]


def run(report: Report, quick: bool) -> None:
    """Measure both implementations."""
    problem = made(counts=(3, 5), slots=20, layers=2) if quick else made(spread(16, 7, 50, 459), slots=300, layers=6)
    ours, theirs = padded(problem), all_pairs(problem)
    apart = max(
        (ours[layer, image, :, :count] - theirs[layer][image]).abs().max().item()
        for layer in range(len(theirs))
        for image, count in enumerate(problem.counts)
    )
    report.agree("costs of all slots and objects, absolute", apart, 1e-4)
    implementations = {BASELINE: partial(all_pairs, problem), "maskset, padded": partial(padded, problem)}
    report.compare(CASE, BASELINE, in_turn(implementations, 0 if quick else 10), peaks(implementations))
    solved = in_turn({"SciPy, one problem after the other": partial(match, ours, problem.counts)}, 0 if quick else 3)
    report.compare("assignment of 6 layers", None, solved)
    report.target(
        "speed-up over all pairs, as in DETR: matching cost of 16 images with 459 objects",
        10,
        report.speedup(CASE, "maskset, padded"),
    )


def spread(images: int, least: int, most: int, total: int) -> tuple[int, ...]:
    """Return the number of objects in each image, from minimum to maximum, with this sum."""
    counts = [round(least + (most - least) * i / (images - 1)) for i in range(images)]
    for i in range(abs(total - sum(counts))):
        counts[1 + i % (images - 2)] += 1 if total > sum(counts) else -1
    return tuple(counts)


def made(counts: Sequence[int], slots: int, layers: int, classes: int = 91) -> Problem:
    """Return random predictions and objects."""
    generator = torch.Generator().manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def boxes(*shape: int) -> Tensor:
        return torch.cat(
            [torch.rand(*shape, 2, generator=generator), torch.rand(*shape, 2, generator=generator) * 0.4 + 0.01], -1
        )

    logits = torch.randn(layers, len(counts), slots, classes, generator=generator) - 3
    predicted = boxes(layers, len(counts), slots)
    labels = [torch.randint(classes, (count,), generator=generator).to(device) for count in counts]
    return Problem(logits.to(device), predicted.to(device), labels, [boxes(count).to(device) for count in counts])


def padded(problem: Problem) -> Float[Tensor, "L B N T"]:
    """Return maskset's costs: only of slots and objects of the same image, for all layers at once."""
    labels, targets = pad(problem.labels), pad(problem.targets)
    cost = FOR_CLASS * focal_cost(problem.logits, labels)
    cost = cost + FOR_L1 * l1_cost(problem.boxes, targets)
    return cost + FOR_GIOU * giou_cost(problem.boxes, targets)


def all_pairs(problem: Problem) -> list[list[Float[Tensor, "N _"]]]:
    """Return the costs of each layer and image, taken from those of the whole batch."""
    labels, targets = torch.cat(list(problem.labels)), torch.cat(list(problem.targets))
    found = []
    for logits, boxes in zip(problem.logits, problem.boxes, strict=True):
        probability, flat = logits.flatten(0, 1).sigmoid(), boxes.flatten(0, 1)
        negative = 0.75 * probability**2 * -(1 - probability + 1e-8).log()
        positive = 0.25 * (1 - probability) ** 2 * -(probability + 1e-8).log()
        of_class = positive[:, labels] - negative[:, labels]
        of_boxes = -generalized_box_iou(box_ops.to_corners(flat), box_ops.to_corners(targets))
        cost = FOR_CLASS * of_class + FOR_L1 * torch.cdist(flat, targets, p=1) + FOR_GIOU * of_boxes
        whole = cost.view(*boxes.shape[:2], -1).split(problem.counts, -1)
        found.append([each[image] for image, each in enumerate(whole)])
    return found
