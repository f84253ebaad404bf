"""Save the batch and report the cause when the loss is not finite."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from maskset.checkpoint import write_tensors
from maskset.errors import TrainingDiverged
from maskset.files import write_json
from maskset.training.state import LAST
from maskset.training.step import NotFinite


def save_diverged_batch(
    folder: Path, step: int, rates: Mapping[str, float], problem: NotFinite, names: Sequence[str], process: int
) -> TrainingDiverged:
    """Write the batch into diverged/ of the run's folder (process 3: diverged_3/), and return the error to raise.

    batch.safetensors gets the pixels (uint8), the sizes, and the boxes and labels of each image; batch.json all the rest.

    Args:
        folder: of the run.
        step: optimizer steps done before.
        rates: learning rates by parameter group.
        problem: the term or gradient that is not finite.
        names: of the images in the batch.
        process: number of this one; where the gradient is not finite all of them come here at once.
    """
    images, objects = problem.batch
    tensors = {"pixels": images.pixels, "sizes": images.sizes}
    for i, targets in enumerate(objects):
        tensors |= {f"boxes/{i}": targets.boxes, f"labels/{i}": targets.labels}
    values = {name: float(term) for name, term in problem.terms.items()}
    facts = {
        "why": problem.why,
        "step": step,
        "learning_rates": dict(rates),
        "terms": {name: value if math.isfinite(value) else str(value) for name, value in values.items()},
        "images": list(names),
        "annotations": [targets.to_coco(i) for i, targets in enumerate(objects)],
    }
    out = folder / (f"diverged_{process}" if process else "diverged")
    out.mkdir(parents=True, exist_ok=True)
    write_tensors(tensors, out / "batch.safetensors", {})
    write_json(facts, out / "batch.json")
    lrs = ", ".join(f"{name} {rate:.3g}" for name, rate in rates.items())
    listed = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    start = f", which may start from this one's last checkpoint with --init {folder}" if (folder / LAST).is_file() else ""
    return TrainingDiverged(
        f"training diverged in step {step}: {problem.why} Learning rates: {lrs}. Images: {listed}. The batch is in {out}. "
        "Try a lower --train.learning-rate, a longer --train.warmup-steps, a smaller --train.clip-norm, or another "
        f"--train.precision than fp16, in a new run{start}."
    )
