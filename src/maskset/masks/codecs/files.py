"""Files of fitted codecs: `maskset codecs fit` writes them, `--model.codec-weights` and `load` read them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from maskset.errors import ConfigError
from maskset.instances import Instances
from maskset.masks.codecs.fittable import FittableCodec
from maskset.masks.targets import crop

FORMAT = "maskset codec 1"


def metadata(codec: FittableCodec) -> dict[str, str]:
    """Return what a file says about the codec in it."""
    return {"format": FORMAT, "kind": codec.kind, "size": str(codec.size), "length": str(codec.length)}


def load(codec: FittableCodec, path: str | Path) -> None:
    """Load a file that `maskset codecs fit` wrote into a codec of the same kind, size and length.

    Raises:
        ConfigError: the file does not exist, is not a codec's, or is that of another codec.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            saved = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as a mask codec: {error}") from None
    if saved.get("format") != FORMAT:
        raise ConfigError(
            f"{path} is not a mask codec that this version of maskset can read: make one with 'maskset codecs fit'."
        )
    differences = [
        f"{name} {saved.get(name)} instead of {value}" for name, value in metadata(codec).items() if saved.get(name) != value
    ]
    if differences:
        raise ConfigError(f"{path} holds another mask codec: {', '.join(differences)}.")
    codec.load_state_dict(weights)


def fit_or_load(codec: nn.Module, targets: Iterable[Instances], path: str | None, **options: Any) -> None:
    """Fit a system's codec to the masks of its training data, or read it from a file; a fixed codec needs neither.

    Args:
        codec: any codec.
        targets: the annotated objects of each training image.
        path: the file, see `load`; None fits the codec.
        options: further arguments of the codec's `fit`.
    """
    if not isinstance(codec, FittableCodec):
        return
    if path is not None:
        load(codec, path)
    else:
        codec.fit((crop(each.masks, each.boxes, codec.size) for each in targets if len(each)), **options)
