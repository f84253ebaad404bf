"""Losses. Each returns sums that the caller divides: what to divide by is the paper's business."""

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


def l1_loss(boxes: Float[Tensor, "n 4"], targets: Float[Tensor, "n 4"]) -> Float[Tensor, "n"]:
    """Return the sum of absolute differences of each pair."""
    return (boxes - targets).abs().sum(-1)


def giou_loss(boxes: Float[Tensor, "n 4"], targets: Float[Tensor, "n 4"]) -> Float[Tensor, "n"]:
    """Return 1 - generalised IoU of each pair of boxes, given as cx cy w h."""
    return 1 - box_ops.generalised_iou(box_ops.to_corners(boxes), box_ops.to_corners(targets))


def dice_loss(probabilities: Float[Tensor, "n *s"], targets: Float[Tensor, "n *s"]) -> Float[Tensor, "n"]:
    """Return 1 - (2 overlap + 1) / (sum of both + 1) of each pair of soft masks (Milletari et al., 3DV 2016; smoothed by 1)."""
    p, t = probabilities.flatten(1), targets.flatten(1)
    return 1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)


def squared_dice_loss(probabilities: Float[Tensor, "n *s"], targets: Float[Tensor, "n *s"], least: float) -> Float[Tensor, "n"]:
    """Return 1 - 2 overlap / (sum of squares of both + least) of each pair of soft masks (V-Net, 3DV 2016, section 3)."""
    p, t = probabilities.flatten(1), targets.flatten(1)
    return 1 - 2 * (p * t).sum(1) / (p.square().sum(1) + t.square().sum(1) + least)


def name_by_layer(terms: Mapping[str, Float[Tensor, "_"]], layers: int) -> dict[str, Tensor]:
    """Return one entry for every layer and term: the last layer's by its name, that of layer 3 as "name/3".

    A term with fewer values than layers is of the last layers.
    """
    named = {}
    for name, values in terms.items():
        for i, value in enumerate(values, layers - len(values)):
            named[name if i == layers - 1 else f"{name}/{i}"] = value
    return named


def sum_by_layer(values: Float[Tensor, "M"], layer: Tensor, layers: int) -> Float[Tensor, "L"]:
    """Return the sum of the values of each layer, given which layer each value belongs to."""
    return values.new_zeros(layers).index_add(0, layer, values)


Piece = Callable[[int, Tensor, Tensor], Float[Tensor, "V"]]


def in_pieces(values: Piece, pieces: Sequence[Tensor], shared: Tensor) -> Float[Tensor, "P V"]:
    """Return `values(i, pieces[i], shared)` of every piece, in the memory of one piece: for losses of many large masks.

    A piece's gradient is taken as soon as its values are known, and its graph is gone before the next piece starts; between
    forward and backward only gradients of the size of `pieces` and `shared`, and what `values` itself refers to, are kept. Where
    the values have not one weight in the total, backward computes all of them once more. Second derivatives are refused.

    Args:
        values: V losses of a piece.
        pieces: such as the mask parameters of the matched slots of one layer each.
        shared: what all pieces use, such as the mask features.
    """
    if not torch.is_grad_enabled():
        return torch.stack([values(i, piece, shared) for i, piece in enumerate(pieces)])
    return _InPieces.apply(values, shared, *pieces)  # type: ignore[no-any-return]


class _InPieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Piece, shared: Tensor, *pieces: Tensor) -> Tensor:
        ctx.values = values
        every, gradients = _walk(values, shared, pieces, None)
        ctx.save_for_backward(shared, *pieces, *gradients)
        return every

    @staticmethod
    @once_differentiable
    def backward(ctx, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (weights,) = outer
        count = len(ctx.saved_tensors) // 2
        inputs, gradients = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        if bool((weights == weights.flatten()[0]).all()):  # the terms of a total: their gradients are there but for the scale
            return None, *(gradient * weights.flatten()[0] for gradient in gradients)
        with torch.autocast(weights.device.type, enabled=False):  # which the caller of the loss had, or had not
            return None, *_walk(ctx.values, inputs[0], inputs[1:], weights)[1]


def _walk(
    values: Piece, shared: Tensor, pieces: Sequence[Tensor], weights: Float[Tensor, "P V"] | None
) -> tuple[Float[Tensor, "P V"], list[Tensor]]:
    """Return the values of all pieces, and the gradients of their weighted sum for `shared` and each piece."""
    total, of_pieces, every = torch.zeros_like(shared), [], []
    for i, piece in enumerate(pieces):
        with torch.enable_grad():
            leaves = (shared.detach().requires_grad_(), piece.detach().requires_grad_())
            found = values(i, leaves[1], leaves[0])
            wanted = found.sum() if weights is None else (found * weights[i]).sum()
            from_shared, from_piece = torch.autograd.grad(wanted, leaves, allow_unused=True, materialize_grads=True)
        total += from_shared
        of_pieces.append(from_piece)
        every.append(found.detach())
    return torch.stack(every), [total, *of_pieces]
