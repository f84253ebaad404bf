"""Losses. Each returns sums or one value per pair; the caller divides them, since papers divide by different counts."""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from maskset import boxes as box_ops


def focal_loss(
    logits: Float[Tensor, "*n"], targets: Float[Tensor, "*n"], alpha: float = 0.25, gamma: float = 2.0
) -> Float[Tensor, "*n"]:
    """Return the sigmoid focal loss of every logit (Lin et al., ICCV 2017, eq. 5); targets are 0 or 1."""
    probability = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    miss = probability * (1 - targets) + (1 - probability) * targets
    return (alpha * targets + (1 - alpha) * (1 - targets)) * miss**gamma * entropy


def varifocal_loss(
    logits: Float[Tensor, "*n K"], targets: Float[Tensor, "*n K"], alpha: float = 0.75, gamma: float = 2.0
) -> Float[Tensor, "*n K"]:
    """Return the varifocal loss of every logit (Zhang et al., CVPR 2021, eq. 2); targets are in [0, 1], 0 for other classes.

    In the paper, all zeros have the focal weight alpha p^gamma. Here the other classes of a slot with an object have the weight
    of its own class: between classes that are equally likely, the focal weight would hardly decide. Weights have no gradient.
    """
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    quality = targets.amax(-1, keepdim=True)
    return entropy * torch.where(quality > 0, quality, alpha * logits.detach().sigmoid() ** gamma)


def l1_loss(boxes: Float[Tensor, "n 4"], targets: Float[Tensor, "n 4"]) -> Float[Tensor, "n"]:
    """Return the sum of absolute differences of each pair."""
    return (boxes - targets).abs().sum(-1)


def giou_loss(boxes: Float[Tensor, "n 4"], targets: Float[Tensor, "n 4"]) -> Float[Tensor, "n"]:
    """Return 1 - generalized IoU of each pair of boxes, given as cx cy w h."""
    return 1 - box_ops.generalized_iou(box_ops.to_corners(boxes), box_ops.to_corners(targets))


def dice_loss(probabilities: Float[Tensor, "n *s"], targets: Float[Tensor, "n *s"]) -> Float[Tensor, "n"]:
    """Return 1 - (2 overlap + 1) / (sum of both + 1) of each pair of soft masks (Milletari et al., 3DV 2016; smoothed by 1)."""
    p, t = probabilities.flatten(1), targets.flatten(1)
    return 1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)


def squared_dice_loss(probabilities: Float[Tensor, "n *s"], targets: Float[Tensor, "n *s"], eps: float) -> Float[Tensor, "n"]:
    """Return 1 - 2 overlap / (sum of squares of both + eps) of each pair of soft masks (V-Net, 3DV 2016, section 3)."""
    p, t = probabilities.flatten(1), targets.flatten(1)
    return 1 - 2 * (p * t).sum(1) / (p.square().sum(1) + t.square().sum(1) + eps)


def name_by_layer(terms: Mapping[str, Float[Tensor, "_"]], layers: int) -> dict[str, Tensor]:
    """Return one entry for every layer and term: the last layer's by its name, that of layer 3 as "name/3".

    A term with fewer values than layers belongs to the last layers.
    """
    named = {}
    for name, values in terms.items():
        for i, value in enumerate(values, layers - len(values)):
            named[name if i == layers - 1 else f"{name}/{i}"] = value
    return named


def sum_by_layer(values: Float[Tensor, "M"], layer: Tensor, layers: int) -> Float[Tensor, "L"]:
    """Return the sum of the values of each layer; `layer` says which layer each value belongs to."""
    return values.new_zeros(layers).index_add(0, layer, values)


ChunkFunction = Callable[[int, Tensor, Tensor], Float[Tensor, "V"]]


def chunked_loss(compute_losses: ChunkFunction, chunks: Sequence[Tensor], shared: Tensor) -> Float[Tensor, "P V"]:
    """Return `compute_losses(i, chunks[i], shared)` for every chunk, in the memory of one chunk: for losses of many large masks.

    The gradient of a chunk is computed together with its values, and its graph is freed before the next chunk starts. Between
    forward and backward, only these gradients, which have the size of `chunks` and `shared`, and the variables captured by the
    function stay in memory. If the values do not have equal weights in the total, backward computes all chunks once more. Second
    derivatives are not supported.

    Args:
        compute_losses: computes the V losses of a chunk.
        chunks: inputs of each chunk, such as the mask parameters of the matched slots of one layer.
        shared: an input of all chunks, such as the mask features.
    """
    if not torch.is_grad_enabled():
        return torch.stack([compute_losses(i, chunk, shared) for i, chunk in enumerate(chunks)])
    return _ChunkedLoss.apply(compute_losses, shared, *chunks)  # type: ignore[no-any-return]


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, compute_losses: ChunkFunction, shared: Tensor, *chunks: Tensor) -> Tensor:
        ctx.compute_losses = compute_losses
        all_losses, gradients = _chunk_backward(compute_losses, shared, chunks, None)
        ctx.save_for_backward(shared, *chunks, *gradients)
        return all_losses

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (weights,) = grad_outputs
        count = len(ctx.saved_tensors) // 2
        inputs, gradients = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        if bool((weights == weights.flatten()[0]).all()):  # as in a sum of terms: the gradients only have to be scaled
            return None, *(gradient * weights.flatten()[0] for gradient in gradients)
        with torch.autocast(weights.device.type, enabled=False):  # whatever the caller of the loss uses
            return None, *_chunk_backward(ctx.compute_losses, inputs[0], inputs[1:], weights)[1]


def _chunk_backward(
    compute_losses: ChunkFunction, shared: Tensor, chunks: Sequence[Tensor], weights: Float[Tensor, "P V"] | None
) -> tuple[Float[Tensor, "P V"], list[Tensor]]:
    """Return the values of all chunks, and the gradients of their weighted sum with respect to `shared` and each chunk."""
    total, chunk_gradients, all_losses = torch.zeros_like(shared), [], []
    for i, chunk in enumerate(chunks):
        with torch.enable_grad():
            leaves = (shared.detach().requires_grad_(), chunk.detach().requires_grad_())
            losses = compute_losses(i, leaves[1], leaves[0])
            total_loss = losses.sum() if weights is None else (losses * weights[i]).sum()
            shared_gradient, chunk_gradient = torch.autograd.grad(total_loss, leaves, allow_unused=True, materialize_grads=True)
        total += shared_gradient
        chunk_gradients.append(chunk_gradient)
        all_losses.append(losses.detach())
    return torch.stack(all_losses), [total, *chunk_gradients]
