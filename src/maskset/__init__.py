"""maskset turns an image into a set of masks: six published systems with transformers, and one of our own."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maskset import recipes
    from maskset.checkpoint import load, save
    from maskset.comparison.compare import compare
    from maskset.conversion import convert
    from maskset.evaluation.evaluate import evaluate
    from maskset.inference.predict import predict
    from maskset.instances import Instances
    from maskset.systems import build
    from maskset.training.train import train

_HOME = {
    "Instances": "maskset.instances",
    "build": "maskset.systems",
    "compare": "maskset.comparison.compare",
    "convert": "maskset.conversion",
    "evaluate": "maskset.evaluation.evaluate",
    "load": "maskset.checkpoint",
    "predict": "maskset.inference.predict",
    "save": "maskset.checkpoint",
    "train": "maskset.training.train",
}

__version__ = "0.1.0"
__all__ = ["Instances", "build", "compare", "convert", "evaluate", "load", "predict", "recipes", "save", "train"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, so that `import maskset` costs nothing."""
    if name == "recipes":
        return import_module("maskset.recipes")
    if name not in _HOME:
        raise AttributeError(f"module 'maskset' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
