"""The demo (`make demo`): find nuclei with the model in the package, then train a small model on generated images."""

from pathlib import Path

from PIL import Image

from maskset.checkpoint import BUNDLED
from maskset.data import open_data
from maskset.evaluation.evaluate import evaluate
from maskset.evaluation.metrics import Metrics
from maskset.inference.predict import predict_files
from maskset.instances.saving import save_predictions
from maskset.training.train import train

_IMAGES = 12

_NUCLEI = """
1. The model "nuclei", which comes with maskset, detects {count} nuclei in a microscope image: {drawing}

2. A model for generated shapes is trained now, for about 3 minutes on two CPU cores:
"""

_NEXT = """
The trained model is in {run}, drawings of its predictions are in {predictions}/drawings. Next steps:

  detect nuclei in your images       maskset predict nuclei IMAGE...
  detect shapes in images            maskset predict {run} IMAGE...
  train on your own data             maskset train sextant-small --data FOLDER --out runs/first
  show a model's settings            maskset show {run}
"""


def demo(folder: Path) -> Metrics:
    """Detect nuclei in an image, train a small model on generated shapes, and return its metrics on test images.

    An interrupted demo is resumed. A finished one is evaluated and drawn again.

    Args:
        folder: gets `nuclei/` with the detected nuclei, `run/` with the trained model, `images/` with 12 test images, and
            `predictions/` with the objects detected in them.
    """
    nuclei, run, images, predictions = (folder / name for name in ("nuclei", "run", "images", "predictions"))
    results = list(predict_files(BUNDLED / "nuclei.safetensors", [BUNDLED / "nuclei.png"], progress=False))
    save_predictions(results, nuclei)
    print(_NUCLEI.format(count=len(results[0][1]), drawing=nuclei / "drawings" / "nuclei.jpg"), flush=True)
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
