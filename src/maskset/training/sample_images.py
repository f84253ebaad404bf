"""Sample images that are drawn after each evaluation: annotations above, predictions below."""

from pathlib import Path

from PIL import Image

from maskset.data import Dataset
from maskset.errors import DataError
from maskset.files import write_picture
from maskset.inference.predict import predict
from maskset.systems import System

_COUNT = 4  # images, spread over the data
_HEIGHT = 320  # height of each drawing, pixels
_THRESHOLD = 0.3  # minimum score of a prediction; scores are low early in training


def draw_samples(model: System, dataset: Dataset, path: Path) -> None:
    """Write one image file with the annotations and predictions of a few images, always the same ones.

    Broken images are left out if the data set skips them; if no image can be read, nothing is written.
    """
    columns = []
    for index in range(0, len(dataset), max(1, len(dataset) // _COUNT))[:_COUNT]:
        try:
            pixels, annotated = dataset.read(index)
        except DataError:
            if not dataset.skip_broken:
                raise
            continue
        predictions = predict(model, pixels, threshold=_THRESHOLD)
        columns.append([_shrunk(objects.draw(pixels)) for objects in (annotated, predictions)])
    if not columns:
        return
    sheet = Image.new("RGB", (sum(above.width for above, _ in columns), 2 * _HEIGHT))
    left = 0
    for pictures in columns:
        for row, picture in enumerate(pictures):
            sheet.paste(picture, (left, row * _HEIGHT))
        left += pictures[0].width
    path.parent.mkdir(exist_ok=True)
    write_picture(sheet, path)


def _shrunk(picture: Image.Image) -> Image.Image:
    return picture.resize((max(1, round(picture.width * _HEIGHT / picture.height)), _HEIGHT), Image.Resampling.LANCZOS)
