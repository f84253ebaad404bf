"""What the codes that are learnt from data (PCA, sparse, and others) share: reading masks, refusing to work unlearnt, files."""

import re
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from maskset.errors import ConfigError

MOST_MASKS = 20_000  # that a code is learnt from: all of COCO's would take an hour to read
GREATEST = 1024  # side of a mask that is coded, pixels
FORMAT = "maskset codec 1"  # what a file of a learnt code says that it is


@runtime_checkable
class LearntCodec(Protocol):
    """A mask code with something to learn; `fitted` says whether it has been, and is saved with the rest."""

    size: int
    length: int
    fitted: Bool[Tensor, ""]

    def fit(self, masks: Tensor | Iterable[Tensor], most_masks: int = MOST_MASKS) -> None: ...
    def encode(self, masks: Float[Tensor, "n S S"]) -> Float[Tensor, "n D"]: ...
    def decode(self, codes: Float[Tensor, "n D"]) -> Float[Tensor, "n S S"]: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state_dict: dict[str, Tensor], /) -> Any: ...


def rows(masks: Tensor | Iterable[Tensor], count: int, most: int = MOST_MASKS) -> Iterator[Tensor]:
    """Yield the first `most` masks [n S S], given whole or in batches, as rows [count S*S] on the CPU.

    Only the last part may have fewer rows; the parts do not depend on how the masks are batched.
    """
    waiting: list[Tensor] = []
    held, left = 0, max(most, 0)
    for batch in [masks] if isinstance(masks, Tensor) else masks:
        waiting.append(batch[:left].flatten(1).cpu())
        held, left = held + len(waiting[-1]), left - len(waiting[-1])
        if held > count:
            *full, rest = torch.cat(waiting).split(count)
            yield from full
            waiting, held = [rest], len(rest)
        if not left:
            if isinstance(masks, Generator):
                masks.close()  # with the bar that it may show
            break
    if held:
        yield torch.cat(waiting)


def require_enough(codec: LearntCodec, found: int, least: int) -> None:
    """Raise unless there are at least so many masks to learn a code from.

    Raises:
        ConfigError: there are fewer.
    """
    if found < least:
        raise ConfigError(
            f"a code of {codec.length} numbers cannot be learnt from {found} masks: "
            f"it needs at least {least}; give more masks or a shorter code."
        )


def require_fitted(codec: LearntCodec) -> None:
    """Raise unless the code has been learnt or loaded.

    Raises:
        ConfigError: it has not.
    """
    # Compilers cannot branch on a value, and what they compile has run before. To ask a GPU again would make the host wait.
    if torch.compiler.is_compiling() or vars(codec).get("_seen_fitted"):
        return
    if not codec.fitted:
        raise ConfigError(
            f"{type(codec).__name__}({codec.size}, {codec.length}) has not been learnt from masks yet: "
            "call fit(masks) first, or load weights that hold it."
        )
    vars(codec)["_seen_fitted"] = True


def load(codec: LearntCodec, path: str | Path) -> None:
    """Fill a code with what `maskset codecs fit` wrote for one of the same kind, size and length.

    Raises:
        ConfigError: the file is not there, is no such file, or is of another code.
    """
    from safetensors import SafetensorError, safe_open

    kind = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", type(codec).__name__.removesuffix("Codec")).lower()  # LogitPca: logit-pca
    wanted = {"kind": kind, "size": str(codec.size), "length": str(codec.length)}
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as a mask code: {error}") from None
    if found.get("format") != FORMAT:
        raise ConfigError(f"{path} is no mask code that this maskset can read: make one with 'maskset codecs fit'.")
    differing = [f"{name} {found.get(name)} instead of {value}" for name, value in wanted.items() if found.get(name) != value]
    if differing:
        raise ConfigError(f"{path} holds another mask code: {', '.join(differing)}.")
    codec.load_state_dict(weights)
