"""The base class of the codecs that are fitted to masks: PCA, logit-PCA, sparse and autoencoder."""

from collections.abc import Generator, Iterable, Iterator
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from maskset.errors import ConfigError, MaskError
from maskset.masks.codecs import Float32Module

MAX_MASKS = 20_000  # default number of masks to fit a codec to; reading all masks of COCO would take an hour
MAX_SIZE = 1024  # largest side of a box-local mask, pixels


class FittableCodec(Float32Module):
    """A mask codec whose parameters are fitted to masks.

    Attributes:
        kind: name of the codec on the command line and in files.
        size: side S of the box-local mask, pixels.
        length: D, how many numbers describe one mask.
        fitted: whether the codec has been fitted; part of its state, so that it is saved and loaded.
    """

    kind: ClassVar[str]
    fitted: Bool[Tensor, ""]

    def __init__(self, size: int, length: int) -> None:
        super().__init__()
        self.size, self.length = size, length
        self.register_buffer("fitted", torch.tensor(False))
        self._fitted_on_host = False  # a copy of `fitted` on the CPU, see `require_fitted`
        self.register_load_state_dict_post_hook(_reset_fitted_on_host)

    def fit(self, masks: Tensor | Iterable[Tensor], max_masks: int = MAX_MASKS) -> None:
        """Fit the codec to masks [n S S] with values in [0, 1], in one tensor or in batches."""
        raise NotImplementedError

    def encode(self, masks: Float[Tensor, "n S S"]) -> Float[Tensor, "n D"]:
        """Return the codes of masks with values in [0, 1].

        Raises:
            ConfigError: the codec has not been fitted.
        """
        self.require_fitted()
        return self._encode(masks)

    def decode(self, codes: Float[Tensor, "n D"]) -> Float[Tensor, "n S S"]:
        """Return real-valued masks; the caller chooses the threshold.

        Raises:
            ConfigError: the codec has not been fitted.
        """
        self.require_fitted()
        return self._decode(codes)

    def _encode(self, masks: Tensor) -> Tensor:
        raise NotImplementedError

    def _decode(self, codes: Tensor) -> Tensor:
        raise NotImplementedError

    def mark_fitted(self, fitted: bool = True) -> None:
        """Set whether the codec is fitted."""
        self.fitted.fill_(fitted)
        self._fitted_on_host = False

    def require_fitted(self) -> None:
        """Raise unless the codec was fitted, or fitted weights were loaded.

        Raises:
            ConfigError: neither was done.
        """
        # The flag is read from its device only once, since the host waits for a GPU then; and compilers cannot branch on it.
        if self._fitted_on_host or torch.compiler.is_compiling():
            return
        if not self.fitted:
            raise ConfigError(
                f"{type(self).__name__}({self.size}, {self.length}) has not been fitted: "
                "call fit(masks) first, or load weights of a fitted one."
            )
        self._fitted_on_host = True

    def require_enough(self, count: int, minimum: int) -> None:
        """Raise unless there are enough masks to fit the codec to.

        Raises:
            ConfigError: there are fewer than `minimum`.
        """
        if count < minimum:
            raise ConfigError(
                f"a codec of {self.length} numbers cannot be fitted to {count} masks: "
                f"it needs at least {minimum}; use more masks or a shorter code."
            )

    def rows(self, masks: Tensor | Iterable[Tensor], count: int, max_masks: int = MAX_MASKS) -> Iterator[Tensor]:
        """Yield the first `max_masks` masks as rows [count S*S] on the CPU, however they are batched.

        Only the last part may have fewer than `count` rows.

        Raises:
            MaskError: masks are not [n S S], or a value is not finite.
        """
        pending: list[Tensor] = []
        count_pending, left = 0, max(max_masks, 0)
        for batch in [masks] if isinstance(masks, Tensor) else masks:
            if batch.shape[1:] != (self.size, self.size):
                raise MaskError(f"the codec needs masks of shape [n, {self.size}, {self.size}], got {list(batch.shape)}.")
            if batch.is_floating_point() and not batch.isfinite().all():
                raise MaskError("a codec cannot be fitted to masks with values that are not finite.")
            pending.append(batch[:left].flatten(1).cpu())
            count_pending, left = count_pending + len(pending[-1]), left - len(pending[-1])
            if count_pending > count:
                *full, rest = torch.cat(pending).split(count)
                yield from full
                pending, count_pending = [rest], len(rest)
            if not left:
                if isinstance(masks, Generator):
                    masks.close()  # also ends a progress bar inside of it
                break
        if count_pending:
            yield torch.cat(pending)


def _reset_fitted_on_host(codec: nn.Module, _: Any) -> None:
    """Read the flag again after loading weights, which may be those of a codec that was not fitted."""
    assert isinstance(codec, FittableCodec)
    codec._fitted_on_host = False
