"""The demo (`make demo`): train a small model on generated images, evaluate it and draw its predictions."""

from pathlib import Path

from PIL import Image

from maskset.data import open_data
from maskset.evaluation.evaluate import evaluate
from maskset.evaluation.metrics import Metrics
from maskset.inference.predict import predict_files
from maskset.instances.saving import save_predictions
from maskset.training.train import train

_IMAGES = 12

_NEXT = """
The model is in {run}, drawings of its predictions are in {predictions}/drawings. Next steps:

  detect objects in your images      maskset predict {run} IMAGE...
  show the model's settings          maskset show {run}
  train on your own data             maskset train sextant-small --data FOLDER --out runs/first
"""


def demo(folder: Path) -> Metrics:
    """Train a small model on generated shapes, and return its metrics on test images.

    An interrupted demo is resumed. A finished one is evaluated and drawn again.

    Args:
        folder: gets `run/` with the model, `images/` with 12 test images, and `predictions/` with the objects detected in them.
    """
    run, images, predictions = folder / "run", folder / "images", folder / "predictions"
    try:
        train("sextant-tiny", "shapes:", run, resume=(run / "recipe.json").is_file())
    except KeyboardInterrupt as interrupt:  # training names its own flag to resume
        raise type(interrupt)("the same command continues the demo.") from None

    print("\nOn 200 test images:\n")
    metrics = evaluate(run, "shapes:", split="test")
    print(metrics)

    test = open_data("shapes:", "test")
    images.mkdir(exist_ok=True)
    for index in range(_IMAGES):
        pixels = test.image(index).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(images / f"{index + 1:02}.png")
    save_predictions(predict_files(run, [images], threshold=0.3), predictions)  # scores are low after so little training
    print(_NEXT.format(run=run, predictions=predictions))
    return metrics
