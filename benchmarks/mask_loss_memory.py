"""Peak memory of one training step, by how the mask losses are computed; written to results/mask_loss_memory.json.

    python benchmarks/mask_loss_memory.py

One image of 800 x 1066 pixels with 50 objects, the ResNet-50 model of each system's recipe with a mask loss on all of its six
decoder layers, float32, forward and backward. Each way runs in a process of its own, on the CPU, on one thread. The figure is
the greatest resident memory of that process, as the kernel counts it: PyTorch returns large tensors to the system at once when
they are freed, so nothing is hidden in a cache. What the process had before the step (libraries, weights, image) is told too.
"""

import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from maskset import losses, recipes
from maskset.masks.dynamic_conv import dynamic_conv
from maskset.matching import Matches
from maskset.structures import ImageBatch, Instances, Masks
from maskset.systems import build, isda, soit

RESULT = Path(__file__).parent / "results" / "mask_loss_memory.json"
HEIGHT, WIDTH, OBJECTS = 800, 1066, 50
WAYS = {
    "no mask loss": "the rest of the step, of which no way can be rid",
    "maskset": "matched slots only, the gradient of a layer taken before the next layer is drawn",
    "matched": "matched slots only, all layers kept for one backward pass",
    "straightforward": "all slots of all layers, kept for one backward pass, unmatched ones weighted with zero: the official way",
}


def isda_none(kernels: Tensor, features: Tensor, masks: Sequence[Tensor], pairs: Matches) -> Tensor:
    """Return no loss that still depends on all inputs."""
    return (kernels.flatten(1).sum(1) + features.sum()) * 0


def isda_all_slots(kernels: Tensor, features: Tensor, masks: Sequence[Tensor], pairs: Matches) -> Tensor:
    """Return the dice loss of each layer as the official code has it: of every slot, times 1 if it is matched, else 0."""
    terms = []
    for layer, of_images in enumerate(kernels):
        total = features.new_zeros(())
        for i, slots in enumerate(of_images):
            here = (pairs.layer == layer) & (pairs.image == i)
            weights, targets = slots.new_zeros(len(slots)), features.new_zeros(len(slots), *features.shape[2:])
            weights[pairs.slot[here]] = 1
            targets[pairs.slot[here]] = masks[i][pairs.object[here]]
            drawn = dynamic_conv(features[i], slots).sigmoid()
            total = total + (losses.squared_dice_loss(drawn, targets, least=0.002) * weights).sum()
        terms.append(total)
    return torch.stack(terms)


def isda_way(way: str) -> None:
    """Let ISDA compute its mask loss in one of the ways."""
    if way == "matched":
        isda.in_pieces = all_at_once
    elif way != "maskset":
        isda._mask_loss = {"no mask loss": isda_none, "straightforward": isda_all_slots}[way]


def all_at_once(values: Callable, pieces: Sequence[Tensor], shared: Tensor) -> Tensor:
    """Return what `maskset.losses.in_pieces` returns, by ordinary means."""
    return torch.stack([values(i, piece, shared) for i, piece in enumerate(pieces)])


def soit_way(way: str) -> None:
    """Let SOIT compute its mask losses in one of the ways. The official code keeps all layers, but draws matched slots only."""
    if way == "matched":
        soit.in_pieces = all_at_once
    elif way == "no mask loss":
        soit.in_pieces = lambda values, pieces, shared: (
            (torch.cat(list(pieces)).sum() + shared.sum()) * 0 * torch.ones(len(pieces), 2)
        )


SYSTEMS: dict[str, tuple[Callable[[str], None], list[str]]] = {  # lets a system compute its mask loss in one of these ways
    "isda": (isda_way, ["no mask loss", "maskset", "matched", "straightforward"]),
    "soit": (soit_way, ["no mask loss", "maskset", "matched"]),  # all slots of all layers do not fit into 24 GB
}


def example(classes: int) -> tuple[Tensor, Instances]:
    """Return a picture of noise and its objects, discs of many sizes."""
    torch.manual_seed(0)
    y, x = torch.arange(HEIGHT)[:, None], torch.arange(WIDTH)[None]
    discs = [((y - HEIGHT * cy) ** 2 + (x - WIDTH * cx) ** 2) ** 0.5 < 20 + 130 * size for cy, cx, size in torch.rand(OBJECTS, 3)]
    masks = Masks.from_dense(torch.stack(discs))
    return torch.randint(256, (3, HEIGHT, WIDTH), dtype=torch.uint8), Instances(
        torch.arange(OBJECTS) % classes, masks.boxes(), masks
    )


def measure(system: str, way: str) -> dict[str, float]:
    """Return memory and time of one step, in this process."""
    SYSTEMS[system][0](way)
    torch.manual_seed(0)
    model = build(recipes.get(f"{system}-r50").model).train()
    pixels, found = example(model.config.num_classes)
    images = ImageBatch.from_images([pixels], model.input.divisor).normalised(model.input)
    before, start = peak(), time.perf_counter()
    terms = model.loss(model(images), images, [found])
    assert sum(name.startswith("mask") for name in terms) >= 6
    torch.stack(list(terms.values())).sum().backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    return {
        "peak_gib": round(peak(), 3),
        "before_gib": round(before, 3),
        "seconds": round(time.perf_counter() - start, 1),
        "gradient_norm": float(norm),
    }


def peak() -> float:
    """Return the greatest resident memory of this process so far, in GiB (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def processor() -> str:
    """Return what Linux calls the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Measure everything and write it down."""
    figures = []
    for system, (_, ways) in SYSTEMS.items():
        for way in ways:
            command = [sys.executable, __file__, system, way]
            run = subprocess.run(
                command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True, check=True
            )
            figures.append({"system": system, "way": way, "meaning": WAYS[way], **json.loads(run.stdout)})
            print(json.dumps(figures[-1]), flush=True)
    head = ["git", "describe", "--always", "--dirty"]
    written = {
        "machine": {
            "cpu": processor(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        },
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "timm")},
        "commit": subprocess.run(head, capture_output=True, text=True, check=True, cwd=RESULT.parent).stdout.strip(),
        "command": "python benchmarks/mask_loss_memory.py",
        "step": f"1 image of {HEIGHT} x {WIDTH} pixels, {OBJECTS} objects, 6 decoder layers with mask loss, float32, 1 thread",
        "figures": figures,
    }
    RESULT.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(measure(*sys.argv[1:])))
    else:
        main()
