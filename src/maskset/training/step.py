"""One optimizer step, on one or several batches of each process, and the average of the weights."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from maskset.errors import MatchingError
from maskset.instances import Instances
from maskset.structures import ImageBatch
from maskset.systems import System

Batch = tuple[ImageBatch, list[Instances]]
Model = TypeVar("Model", bound=nn.Module)


class Step(nn.Module):
    """Model and loss. DDP wraps this module, so that gradients of parameters that only the loss uses are synchronized too."""

    def __init__(self, system: System) -> None:
        super().__init__()
        self.system = system

    def forward(self, images: ImageBatch, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Return the weighted terms of the loss."""
        return self.system.loss(self.system(images), images, targets)


class NotFinite(ArithmeticError):
    """A term of the loss, or the gradient, is NaN or infinite.

    Args:
        reason: the reason, as a sentence.
        terms: the terms of the loss that were computed.
        batch: the batch.
        batch_index: index of the batch in the step.
    """

    def __init__(self, reason: str, terms: Mapping[str, Tensor], batch: Batch, batch_index: int) -> None:
        super().__init__(reason)
        self.reason, self.terms, self.batch, self.batch_index = reason, terms, batch, batch_index


def update(
    accelerator: Accelerator, step: nn.Module, optimizer: Optimizer, batches: Sequence[Batch], clip_norm: float
) -> tuple[dict[str, Tensor], Tensor]:
    """Do one optimizer step; return the loss and its terms in this process, and the norm of the gradient before clipping.

    The gradient is the mean over batches and processes; each batch has its own loss divisors, as in the official code.

    Args:
        accelerator: the accelerator that prepared `step` and `optimizer`.
        step: a `Step`.
        optimizer: the optimizer of its parameters.
        batches: uint8 pixels and targets, on the CPU; they are computed one after the other.
        clip_norm: maximum norm of the gradient; 0 disables clipping.

    Raises:
        NotFinite: a term or the gradient is not finite; no weight was changed.
    """
    optimizer.zero_grad()
    shares = []
    for batch_index, batch in enumerate(batches):
        with nullcontext() if batch_index == len(batches) - 1 else accelerator.no_sync(step):
            terms = _terms(accelerator, step, batch, batch_index)
            accelerator.backward(terms["loss"] / len(batches))
        shares.append({name: term.detach() / len(batches) for name, term in terms.items()})
    norm = accelerator.clip_grad_norm_(step.parameters(), clip_norm or torch.inf)
    assert isinstance(norm, Tensor)
    scale = 0.0 if accelerator.scaler is None else accelerator.scaler.get_scale()
    # In fp16 the scaler skips such a step and halves its factor. If the factor is below 1, the loss itself is the problem.
    if scale < 1 and not torch.isfinite(norm):
        raise NotFinite(f"the norm of the gradient is {norm.item()}.", shares[-1], batches[-1], len(batches) - 1)
    optimizer.step()
    return {name: torch.stack([share[name] for share in shares]).sum() for name in shares[0]}, norm


def _terms(accelerator: Accelerator, step: nn.Module, batch: Batch, batch_index: int) -> dict[str, Tensor]:
    """Return the loss of a batch, as the first entry, and its terms."""
    system: System = accelerator.unwrap_model(step).system
    images = batch[0].to(accelerator.device, non_blocking=True).normalized(system.input)
    try:
        terms = step(images, batch[1])  # targets stay on the CPU, where the loss draws masks while a GPU computes
    except MatchingError as error:
        raise NotFinite(str(error), {}, batch, batch_index) from None
    total = torch.stack(list(terms.values())).sum()
    if not torch.isfinite(total):
        values = {name: term.detach() for name, term in terms.items()}
        bad = [f"{name} is {value.item()}" for name, value in values.items() if not torch.isfinite(value)]
        reason = f"non-finite loss terms: {', '.join(bad)}." if bad else "the sum of the loss terms is infinite."
        raise NotFinite(reason, values, batch, batch_index)
    return {"loss": total, **terms}


def mean(accelerator: Accelerator, values: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the means over the processes."""
    stacked = torch.stack([value.float() for value in values.values()])
    return dict(zip(values, accelerator.reduce(stacked, "mean").tolist(), strict=True))  # type: ignore[union-attr]


def averaged_copy(model: Model) -> Model:
    """Return a copy of the model, in evaluation mode, for `average`."""
    return copy.deepcopy(model).requires_grad_(False).eval()


@torch.no_grad()
def average(averaged: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Update averaged weights in place: averaged = d * averaged + (1 - d) * weights.

    Args:
        averaged: a model made by `averaged_copy`.
        model: the model that is trained.
        decay: d. In the first steps d is at most (1 + step) / (10 + step), else the initial weights would dominate.
        step: optimizer steps done, at least 1.
    """
    share = 1 - min(decay, (1 + step) / (10 + step))
    for mean_weight, weight in zip(averaged.parameters(), model.parameters(), strict=True):
        mean_weight.lerp_(weight, share)
    for mean_value, value in zip(averaged.buffers(), model.buffers(), strict=True):  # statistics of batch norms are means already
        mean_value.copy_(value)
