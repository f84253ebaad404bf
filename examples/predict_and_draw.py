"""Find objects in images, draw them, and look at the masks: python examples/predict_and_draw.py MODEL FOLDER OUT"""

import sys
from pathlib import Path

import maskset
from maskset.inference.predict import predict_files


def main(model: str, source: str, out: str, threshold: float = 0.5) -> int:
    """Return how many objects were found in all images."""
    folder, count = Path(out), 0
    folder.mkdir(parents=True, exist_ok=True)
    for file, found in predict_files(maskset.load(model), [source], threshold=threshold):
        for name, one in zip(found.names, found, strict=True):
            height, width = one.masks.size
            share = int(one.masks.areas()) / (height * width)
            print(f"{file.name}: {name}, {share:.1%} of the image, outline of {len(one.to_polygons()[0])} part(s)")
        found.save(folder / f"{file.stem}.json")  # COCO; a .png without an image is a label image
        found.save(folder / f"{file.stem}.jpg", image=file)
        count += len(found)
    return count


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3])
