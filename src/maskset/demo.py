"""A small model from nothing to pictures, on generated images: what `make demo` runs. A plain script over public functions."""

from pathlib import Path

from PIL import Image

from maskset.data import open_data
from maskset.evaluation.evaluate import evaluate
from maskset.evaluation.metrics import Metrics
from maskset.inference.predict import predict_files
from maskset.instances.saving import save_predictions
from maskset.training.train import train

_PICTURES = 12

_NEXT = """
The model is in {run}, pictures of what it finds are in {found}/drawings. What to type next:

  find objects in your pictures      maskset predict {run} PICTURE...
  see the model's settings           maskset show {run}
  learn from your own data           maskset train solq-small --data FOLDER --out runs/first
"""


def demo(folder: Path) -> Metrics:
    """Train a small model on generated shapes, and return how well it does on images that it has not seen.

    A demo that was interrupted goes on where it stopped; one that is finished is measured and drawn again.

    Args:
        folder: gets `run/` with the model, `images/` with pictures to look at, and `found/` with what the model finds in them.
    """
    run, images, found = folder / "run", folder / "images", folder / "found"
    train("solq-tiny", "shapes", run, resume=(run / "recipe.json").is_file())

    print("\nOn 200 images that had no part in the training:\n")
    metrics = evaluate(run, "shapes", split="test")
    print(metrics)

    unseen = open_data("shapes", "test")
    images.mkdir(exist_ok=True)
    for index in range(_PICTURES):
        pixels = unseen.image(index).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(images / f"{index + 1:02}.png")
    save_predictions(predict_files(run, [images], threshold=0.3), found)  # so little training leaves scores low
    print(_NEXT.format(run=run, found=found))
    return metrics
