"""What is saved and reported when the loss is not finite."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from maskset.checkpoint import write_tensors
from maskset.errors import TrainingDiverged
from maskset.files import write_json
from maskset.messages import first_names
from maskset.training.state import LAST
from maskset.training.step import NotFinite


def save_diverged_batch(
    folder: Path, step: int, rates: Mapping[str, float], problem: NotFinite, names: Sequence[str], process: int
) -> TrainingDiverged:
    """Write the batch to diverged/ in the run folder, and return the error to raise.

    batch.safetensors contains the pixels (uint8), the sizes, and the boxes and labels of each image; batch.json contains the
    reason, the terms of the loss, the learning rates, and the names and annotations of the images.

    Args:
        folder: the run folder.
        step: number of optimizer steps before this one.
        rates: learning rates by parameter group.
        problem: the error that a step raised.
        names: names of the images in the batch.
        process: index of this process. Process 3 writes to diverged_3/, since several may fail in the same step.
    """
    images, batch_targets = problem.batch
    tensors = {"pixels": images.pixels, "sizes": images.sizes}
    for i, targets in enumerate(batch_targets):
        tensors |= {f"boxes/{i}": targets.boxes, f"labels/{i}": targets.labels}
    values = {name: float(term) for name, term in problem.terms.items()}
    facts = {
        "reason": problem.reason,
        "step": step,
        "learning_rates": dict(rates),
        "terms": {name: value if math.isfinite(value) else str(value) for name, value in values.items()},
        "images": list(names),
        "annotations": [targets.to_coco(i) for i, targets in enumerate(batch_targets)],
    }
    out = folder / (f"diverged_{process}" if process else "diverged")
    out.mkdir(parents=True, exist_ok=True)
    write_tensors(tensors, out / "batch.safetensors", {})
    write_json(facts, out / "batch.json")
    learning_rates = ", ".join(f"{name} {rate:.3g}" for name, rate in rates.items())
    start = f", which can start from the last checkpoint: --init {folder}" if (folder / LAST).is_file() else ""
    return TrainingDiverged(
        f"training diverged in step {step}: {problem.reason} Learning rates: {learning_rates}. Images: {first_names(names, 4)}. "
        f"The batch is in {out}. Try a lower --train.learning-rate, a longer --train.warmup-steps, a smaller "
        f"--train.clip-norm, or another --train.precision than fp16, in a new run{start}."
    )
