"""Predict on images, draw the detections and measure their masks: python examples/predict_and_draw.py MODEL FOLDER OUT"""

import sys
from pathlib import Path

import maskset
from maskset.inference.predict import predict_files


def main(model: str, source: str, out: str, threshold: float = 0.5) -> int:
    """Return the number of detections in all images."""
    folder, count = Path(out), 0
    folder.mkdir(parents=True, exist_ok=True)
    for file, detections in predict_files(maskset.load(model), [source], threshold=threshold):
        for name, detection in zip(detections.names, detections, strict=True):
            height, width = detection.masks.size
            share = int(detection.masks.areas()) / (height * width)
            print(f"{file.name}: {name}, {share:.1%} of the image, {len(detection.to_polygons()[0])} polygon(s)")
        detections.save(folder / f"{file.stem}.json")  # COCO; a .png without an image is a label image
        detections.save(folder / f"{file.stem}.jpg", image=file)
        count += len(detections)
    return count


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3])
