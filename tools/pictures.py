"""Draw docs/assets/results.webp, the picture in the README: held-out images above, predictions of small models below.

    python tools/pictures.py --nuclei-data DATA [--shapes RUN]

The nuclei are those that the model in the package detects; src/maskset/models/nuclei.md describes DATA. RUN is the folder that
`maskset demo` trains, demo/run.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

import maskset
from maskset.data import open_data
from maskset.instances.drawing import draw_objects

OUT = Path(__file__).parents[1] / "docs" / "assets" / "results.webp"
NUCLEI = ("337b6eed0726", "64eeef16fdc4", "4c465a54e329")  # starts of file names: typical images of three kinds
SHAPES = (0, 5)  # indices into the generated split `test`
THRESHOLD = 0.5  # minimum score of a prediction that is drawn
PANEL, GAP = 360, 8  # pixels


def main() -> None:
    """Predict, and write the picture."""
    parser = argparse.ArgumentParser(description="Draw the picture in the README.")
    parser.add_argument("--nuclei-data", required=True, help="folder with the images of nuclei")
    parser.add_argument("--shapes", default="demo/run", help="run folder of the model for shapes (default: demo/run)")
    arguments = parser.parse_args()

    nuclei = open_data(arguments.nuclei_data, "val")
    names = [record.file.name if record.file else "" for record in nuclei.images]
    indices = [next(i for i, name in enumerate(names) if name.startswith(start)) for start in NUCLEI]
    panels = [panel("nuclei", nuclei.image(index)) for index in indices]
    shapes = open_data("shapes:", "test")
    panels += [panel(arguments.shapes, shapes.image(index)) for index in SHAPES]
    compose(panels).save(OUT, quality=88, method=6)
    print(f"{OUT}: {OUT.stat().st_size / 1000:.0f} kB")


def panel(model: str, pixels: UInt8[Tensor, "3 h w"]) -> tuple[Image.Image, Image.Image]:
    """Return an image and the same image with a model's predictions, both cropped to a square of PANEL pixels."""
    detections = maskset.predict(model, pixels, threshold=THRESHOLD)
    height, width = detections.masks.size
    scale = -(-2 * PANEL // min(height, width))  # drawn at twice the size, for smooth lines
    captions = [""] * len(detections)
    classes = len(detections.categories)
    drawn = draw_objects(pixels, detections.masks, detections.boxes, detections.labels, captions, classes, scale)
    plain = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    return square(plain), square(drawn)


def square(image: Image.Image) -> Image.Image:
    """Return the center of an image at PANEL pixels."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((PANEL, PANEL), Image.Resampling.LANCZOS)


def compose(panels: Sequence[tuple[Image.Image, Image.Image]]) -> Image.Image:
    """Return all pairs side by side, on a transparent background."""
    picture = Image.new("RGBA", (len(panels) * (PANEL + GAP) - GAP, 2 * PANEL + GAP))
    for column, pair in enumerate(panels):
        for row, image in enumerate(pair):
            picture.paste(image, (column * (PANEL + GAP), row * (PANEL + GAP)))
    return picture


if __name__ == "__main__":
    main()
