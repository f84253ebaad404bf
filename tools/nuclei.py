"""Put a trained sextant-nuclei into the package as the model "nuclei", and write its results into its card.

    maskset train sextant-nuclei --data DATA --out RUN
    python tools/nuclei.py RUN --data DATA

DATA is described in the card, src/maskset/models/nuclei.md. The last weights of the run are written in half precision to
nuclei.safetensors beside it, the results on val into its tables, and the curves of the training to
docs/assets/nuclei-training.svg. Neither weights nor threshold are selected by their results on val: the weights are those after
the last epoch, and the threshold is the default of `maskset predict`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from jaxtyping import UInt8
from torch import Tensor

import maskset
from maskset import checkpoint
from maskset.data import open_data
from maskset.data.dataset import Dataset
from maskset.evaluation.average_precision import compute_metrics
from maskset.evaluation.cells import cell_accuracy
from maskset.evaluation.evaluate import detections_in
from maskset.evaluation.overlaps import overlaps
from maskset.files import atomic_write

ROOT = Path(__file__).parents[1]
MODEL = checkpoint.BUNDLED / "nuclei.safetensors"
CARD = checkpoint.BUNDLED / "nuclei.md"
CURVES = ROOT / "docs" / "assets" / "nuclei-training.svg"
SOURCE = "maskset train sextant-nuclei, on 536 images of BBBC038v1 (CC0 1.0): see maskset/models/nuclei.md"
MAX_DETECTIONS = 400
THRESHOLD = 0.5  # of the accuracy; the default of `maskset predict`
KINDS = ("fluorescence", "stained tissue", "bright field")


def main() -> None:
    """Write the model, its results and its curves."""
    parser = argparse.ArgumentParser(description="Put a trained sextant-nuclei into the package.")
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--data", required=True, help="folder with the images of nuclei")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    last = arguments.run / "last.safetensors"
    recipe = checkpoint.read_metadata(last).recipe
    maskset.save(maskset.load(last).half(), recipe, MODEL, source=SOURCE, license="Apache-2.0")
    tables = "\n".join(results(open_data(arguments.data, "val")))
    before, _, rest = CARD.read_text().partition("<!-- results -->")
    after = rest.partition("<!-- end -->")[2]
    with atomic_write(CARD) as part:
        part.write_text(f"{before}<!-- results -->\n{tables}\n<!-- end -->{after}")
    draw_curves([json.loads(line) for line in (arguments.run / "metrics.jsonl").read_text().splitlines()])
    print(f"{tables}\n\nwritten: {MODEL} ({MODEL.stat().st_size / 1e6:.1f} MB), {CARD}, {CURVES}")


def results(data: Dataset) -> Iterator[str]:
    """Yield the lines of the card's tables, for the model in the package."""
    model = maskset.load(MODEL)  # by its file: a run folder called nuclei would come first
    overlaps_of = {i: overlaps(data, i, found) for i, found in detections_in(model, data, range(len(data)), MAX_DETECTIONS)}
    kinds = {i: kind_of(data.image(i)) for i in overlaps_of}
    groups = {kind: [image for i, image in sorted(overlaps_of.items()) if kinds[i] == kind] for kind in KINDS}
    groups["all"] = [overlaps_of[i] for i in sorted(overlaps_of)]
    yield "| images | number | nuclei | mask AP | AP50 | AP75 |"
    yield "|---|---|---|---|---|---|"
    for kind, images in groups.items():
        metrics = compute_metrics(images, data.categories, MAX_DETECTIONS)
        scores = " | ".join(f"{value:.3f}" for value in (metrics.mask_ap, metrics.mask_ap50, metrics.mask_ap75))
        yield f"| {kind} | {metrics.images} | {metrics.objects:,} | {scores} |"
    yield ""
    accuracy = {kind: cell_accuracy(images, THRESHOLD) for kind, images in groups.items()}
    ious = list(accuracy["all"])
    yield f"| TP / (TP + FP + FN) at a score of {THRESHOLD:g} | {' | '.join(f'IoU {iou:g}' for iou in ious)} | mean |"
    yield "|" + "---|" * (len(ious) + 2)
    for kind, values in accuracy.items():
        numbers = [*values.values(), statistics.mean(values.values())]
        yield f"| {kind} | {' | '.join(f'{value:.3f}' for value in numbers)} |"
    yield ""
    picture = data.image(0)[:, :256, :256].repeat(1, 2, 2)
    seconds = statistics.median(seconds_of(model, picture) for _ in range(7))
    found = len(maskset.predict(model, picture))
    yield f"`maskset.predict` takes {seconds:.2f} s for an image of 512 x 512 pixels with {found} nuclei, on one core ({cpu()})."


def kind_of(pixels: UInt8[Tensor, "3 h w"]) -> str:
    """Return which of KINDS an image is: fluorescence is gray on black, stained tissue colored, bright field gray on white."""
    if bool((pixels != pixels[:1]).any()):
        return "stained tissue"
    return "fluorescence" if int(pixels.median()) < 100 else "bright field"


def seconds_of(model: maskset.systems.System, picture: UInt8[Tensor, "3 h w"]) -> float:
    """Return how long a prediction takes."""
    start = time.perf_counter()
    maskset.predict(model, picture)
    return time.perf_counter() - start


def cpu() -> str:
    """Return the name of the processor."""
    lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return lines[0].partition(":")[2].strip() if lines else "unknown processor"


def draw_curves(rows: Sequence[dict]) -> None:
    """Draw loss and mask AP against the step."""
    train, val = ([row for row in rows if row["split"] == split] for split in ("train", "val"))
    plt.rcParams["svg.hashsalt"] = "nuclei"
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    left.plot([row["step"] for row in train], [row["loss"] for row in train], linewidth=0.8)
    left.set(xlabel="step", ylabel="training loss", ylim=(0, None))
    for name, label in (("mask_ap50", "AP50"), ("mask_ap", "mask AP")):
        right.plot([row["step"] for row in val], [row[name] for row in val], marker="o", markersize=3, label=label)
    right.set(xlabel="step", ylabel="val", ylim=(0, 1))
    right.legend(loc="lower right")
    figure.savefig(CURVES, metadata={"Date": None})


if __name__ == "__main__":
    main()
