"""Train a small model on your own images: python examples/train_on_your_data.py DATA RUN [EPOCHS]

DATA is a folder of images with COCO JSON files, or `shapes:` for generated images.
"""

import sys
from dataclasses import replace

import maskset
from maskset.evaluation.metrics import Metrics


def main(data: str, run: str, epochs: int = 6) -> Metrics:
    """Return the metrics of the trained model on the `val` split."""
    recipe = maskset.recipes.solq_tiny()
    # A recipe is a frozen dataclass: change any setting with `replace`. The run folder keeps the result in recipe.json.
    recipe = replace(recipe, train=replace(recipe.train, epochs=epochs))
    metrics = maskset.train(recipe, data, run)
    print(metrics)
    for worst in sorted(metrics.per_class, key=lambda row: row.mask_ap)[:5]:
        print(f"{worst.name}: mask AP {worst.mask_ap:.3f} on {worst.objects} objects")
    return metrics


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 6)
