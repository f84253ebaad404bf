"""What the codes that are learnt from data share: reading masks in batches of one size, and refusing to work unlearnt."""

from collections.abc import Iterable, Iterator
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from maskset.config import ConfigError


@runtime_checkable
class LearntCodec(Protocol):
    """A mask code with something to learn; `fitted` says whether it has been, and is saved with the rest."""

    size: int
    length: int
    fitted: Bool[Tensor, ""]


def rows(masks: Tensor | Iterable[Tensor], count: int) -> Iterator[Tensor]:
    """Yield masks [n S S], given whole or in batches, as rows [count S*S] on the CPU; only the last part may be shorter."""
    waiting: list[Tensor] = []
    total = 0
    for batch in [masks] if isinstance(masks, Tensor) else masks:
        waiting.append(batch.flatten(1).cpu())
        total += len(batch)
        if total > count:
            *full, rest = torch.cat(waiting).split(count)
            yield from full
            waiting, total = [rest], len(rest)
    if total:
        yield torch.cat(waiting)


def require_enough(codec: LearntCodec, found: int) -> None:
    """Raise unless there are at least as many masks to learn a code from as it has numbers.

    Raises:
        ConfigError: there are fewer.
    """
    if found < codec.length:
        raise ConfigError(
            f"a code of {codec.length} numbers cannot be learnt from {found} masks: "
            f"it needs at least {codec.length}; give more masks or a shorter code."
        )


def require_fitted(codec: LearntCodec) -> None:
    """Raise unless the code has been learnt or loaded.

    Raises:
        ConfigError: it has not.
    """
    # Compilers cannot branch on a value, and what they compile has run before.
    if not torch.compiler.is_compiling() and not codec.fitted:
        raise ConfigError(
            f"{type(codec).__name__}({codec.size}, {codec.length}) has not been learnt from masks yet: "
            "call fit(masks) first, or load weights that hold it."
        )
