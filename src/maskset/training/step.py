"""One optimizer step, on one or several batches of each process."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from maskset.errors import MatchingError
from maskset.instances import Instances
from maskset.structures import ImageBatch
from maskset.systems import System

Batch = tuple[ImageBatch, list[Instances]]


class Step(nn.Module):
    """Computes the terms of the loss for a batch. DDP wraps this module, so that it also sees parameters only the loss uses."""

    def __init__(self, system: System) -> None:
        super().__init__()
        self.system = system

    def forward(self, images: ImageBatch, objects: Sequence[Instances]) -> dict[str, Tensor]:
        """Return the weighted terms."""
        return self.system.loss(self.system(images), images, objects)


class NotFinite(ArithmeticError):
    """A term of the loss, or the gradient, is NaN or infinite.

    Args:
        why: a sentence.
        terms: of the loss, as far as they are known.
        batch: the batch in which it occurred.
        place: index of this batch in the step.
    """

    def __init__(self, why: str, terms: Mapping[str, Tensor], batch: Batch, place: int) -> None:
        super().__init__(why)
        self.why, self.terms, self.batch, self.place = why, terms, batch, place


def update(
    accelerator: Accelerator, step: nn.Module, optimizer: Optimizer, batches: Sequence[Batch], clip_norm: float
) -> tuple[dict[str, Tensor], Tensor]:
    """Do one optimizer step and return this process's loss and its terms, and the norm of the gradient before clipping.

    The gradient is the mean over batches and processes; each batch has its own divisors, as in the official code.

    Args:
        accelerator: has prepared `step` and `optimizer`.
        step: a `Step`.
        optimizer: over its parameters.
        batches: uint8 pixels and objects, on the CPU; they are computed one after the other.
        clip_norm: maximum norm of the gradient; 0 disables clipping.

    Raises:
        NotFinite: a term or the gradient is not finite; no weight has changed.
    """
    optimizer.zero_grad()
    shares = []
    for place, batch in enumerate(batches):
        with nullcontext() if place == len(batches) - 1 else accelerator.no_sync(step):
            terms = _terms(accelerator, step, batch, place)
            accelerator.backward(terms["loss"] / len(batches))
        shares.append({name: term.detach() / len(batches) for name, term in terms.items()})
    norm = accelerator.clip_grad_norm_(step.parameters(), clip_norm or torch.inf)
    assert isinstance(norm, Tensor)
    scale = 0.0 if accelerator.scaler is None else accelerator.scaler.get_scale()
    # In fp16 the scaler leaves such a step out and halves its factor; below 1 it was not the factor that was too great.
    if scale < 1 and not torch.isfinite(norm):
        raise NotFinite(f"the norm of the gradient is {norm.item()}.", shares[-1], batches[-1], len(batches) - 1)
    optimizer.step()
    return {name: torch.stack([share[name] for share in shares]).sum() for name in shares[0]}, norm


def _terms(accelerator: Accelerator, step: nn.Module, batch: Batch, place: int) -> dict[str, Tensor]:
    """Return the loss of a batch and, after it, its terms."""
    system: System = accelerator.unwrap_model(step).system
    images = batch[0].to(accelerator.device, non_blocking=True).normalized(system.input)
    try:
        terms = step(images, batch[1])  # objects stay on the host, where the loss draws its targets while a GPU computes
    except MatchingError as error:
        raise NotFinite(str(error), {}, batch, place) from None
    total = torch.stack(list(terms.values())).sum()
    if not torch.isfinite(total):
        values = {name: term.detach() for name, term in terms.items()}
        bad = [f"{name} is {value.item()}" for name, value in values.items() if not torch.isfinite(value)]
        reason = f"non-finite loss terms: {', '.join(bad)}." if bad else "the sum of the loss terms is infinite."
        raise NotFinite(reason, values, batch, place)
    return {"loss": total, **terms}


def mean(accelerator: Accelerator, values: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the means over the processes."""
    stacked = torch.stack([value.float() for value in values.values()])
    return dict(zip(values, accelerator.reduce(stacked, "mean").tolist(), strict=True))  # type: ignore[union-attr]
