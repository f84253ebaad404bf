"""Train a small model on your own images: python examples/train_on_your_data.py DATA RUN [EPOCHS]

DATA is a folder with COCO JSON files, or the word shapes for generated images.
"""

import sys
from dataclasses import replace

import maskset
from maskset.evaluation.metrics import Metrics


def main(data: str, run: str, epochs: int = 6) -> Metrics:
    """Return what the trained model reaches on the images in the data's split val."""
    recipe = maskset.recipes.solq_tiny()
    # A recipe is plain data: change what you like, and the run folder's recipe.json will tell you later what you did
    recipe = replace(recipe, train=replace(recipe.train, epochs=epochs, drop_epochs=(round(epochs * 0.7),)))
    metrics = maskset.train(recipe, data, run)
    print(metrics)
    for one in sorted(metrics.per_class, key=lambda one: one.mask_ap)[:5]:
        print(f"{one.name}: mask AP {one.mask_ap:.3f} on {one.objects} objects")
    return metrics


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 6)
