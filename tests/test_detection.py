import itertools

import pytest
import torch
from torch import nn

from maskset.boxes import generalized_iou, to_corners
from maskset.detection import focal_cost, giou_cost, l1_cost, match, pad, soft_iou_cost
from maskset.errors import MatchingError
from maskset.losses import focal_loss


def problem(seed=0, layers=2, slots=5, counts=(3, 0, 2), classes=4):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(layers, len(counts), slots, classes, generator=generator)
    boxes = torch.rand(layers, len(counts), slots, 4, generator=generator) * 0.4 + 0.1
    labels = [torch.randint(classes, (n,), generator=generator) for n in counts]
    targets = [torch.rand(n, 4, generator=generator) * 0.4 + 0.1 for n in counts]
    return logits, boxes, labels, targets


def test_costs_are_those_of_each_pair_alone():
    logits, boxes, labels, targets = problem()
    classes, l1, giou = focal_cost(logits, pad(labels)), l1_cost(boxes, pad(targets)), giou_cost(boxes, pad(targets))
    for layer, image, slot in itertools.product(range(2), range(3), range(5)):
        for t, (label, target) in enumerate(zip(labels[image], targets[image], strict=True)):
            p = logits[layer, image, slot, label].sigmoid()
            expected = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log() - 0.75 * p**2 * -(1 - p + 1e-8).log()
            box = boxes[layer, image, slot]
            torch.testing.assert_close(classes[layer, image, slot, t], expected)
            torch.testing.assert_close(l1[layer, image, slot, t], (box - target).abs().sum())
            torch.testing.assert_close(giou[layer, image, slot, t], -generalized_iou(to_corners(box), to_corners(target)))


def test_the_soft_iou_cost_is_that_of_each_pair_alone():
    torch.manual_seed(0)
    masks, targets = torch.rand(3, 4, 5), torch.randint(5, (2, 4, 5)) / 4
    costs = soft_iou_cost(masks, targets)
    for slot, t in itertools.product(range(3), range(2)):
        pairs = list(zip(masks[slot].flatten().tolist(), targets[t].flatten().tolist(), strict=True))
        overlap = sum(p * g for p, g in pairs)
        union = sum(p + g for p, g in pairs) - overlap
        assert costs[slot, t].item() == pytest.approx(1 - overlap / (union + 1e-6), abs=1e-6)


def test_the_soft_iou_cost_of_a_mask_with_itself_is_nothing_and_of_an_empty_one_is_one():
    mask = (torch.rand(1, 6, 6) > 0.5).float()
    assert soft_iou_cost(mask, mask).item() == pytest.approx(0, abs=1e-6)
    assert soft_iou_cost(mask, torch.zeros(1, 6, 6)).item() == 1
    assert soft_iou_cost(torch.zeros(1, 6, 6), torch.zeros(1, 6, 6)).item() == 1


@pytest.mark.parametrize("slots", [3, 5])
def test_the_assignment_is_the_cheapest_of_all(slots):
    counts = (3, 0, 2)
    cost = torch.randn(2, 3, slots, 3, generator=torch.Generator().manual_seed(slots))
    assignment = match(cost, counts)
    for layer, image in itertools.product(range(2), range(3)):
        rows = (assignment.layer == layer) & (assignment.image == image)
        assert sorted(assignment.object[rows].tolist()) == list(range(counts[image]))
        total = cost[layer, image, assignment.slot[rows], assignment.object[rows]].sum()
        orders = itertools.permutations(range(slots), counts[image])
        cheapest = min(sum(cost[layer, image, s, t].item() for t, s in enumerate(order)) for order in orders)
        assert total.item() == pytest.approx(cheapest, abs=1e-5)


def test_more_objects_than_slots_leaves_the_dearest_out():
    assignment = match(torch.tensor([[[[1.0, 5, 2], [1, 1, 9]]]]), [3])
    assert assignment.slot.tolist() == [0, 1]
    assert assignment.object.tolist() == [0, 1]
    assert match(torch.tensor([[[[1.0, 5, 2]]]]), [3]).object.tolist() == [0]


def test_a_cost_that_is_not_finite_names_the_tensor_that_is_to_blame():
    boxes, logits = torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 5)
    boxes[1, 0, 2] = torch.inf
    with pytest.raises(MatchingError, match=r"layer 1, image 0 .* slots \[2\], because boxes is"):
        match(l1_cost(boxes, torch.zeros(1, 1, 4)), [1], {"class_logits": logits, "boxes": boxes})


def test_a_cost_that_is_not_finite_names_layer_image_and_slot():
    cost = torch.zeros(3, 2, 4, 2)
    cost[1, 1, 2, 0] = torch.nan
    with pytest.raises(MatchingError, match=r"layer 1, image 1 .* slots \[2\]"):
        match(cost, [2, 2])
    for infinite in (-torch.inf, torch.inf):
        cost = torch.zeros(1, 1, 3, 2)
        cost[0, 0, 1] = infinite
        with pytest.raises(MatchingError, match=r"layer 0, image 0 .* slots \[1\]"):
            match(cost, [2])


def test_padding_is_never_matched_nor_checked():
    cost = torch.zeros(1, 2, 4, 3)
    cost[0, 0, :, 1:] = torch.nan
    assert match(cost, [1, 3]).object.tolist() == [0, 0, 1, 2]


def test_focal_loss_is_the_formula_of_the_paper():
    logits = torch.linspace(-6, 6, 25, dtype=torch.float64, requires_grad=True)
    for target in (0.0, 1.0):
        p = logits.sigmoid()
        chance = p if target else 1 - p
        expected = -(0.25 if target else 0.75) * (1 - chance) ** 2 * chance.log()
        torch.testing.assert_close(focal_loss(logits, torch.full_like(logits, target)), expected)


def test_losses_are_finite_where_the_sigmoid_saturates():
    logits = nn.Parameter(torch.tensor([-200.0, 200.0]))
    loss = focal_loss(logits, torch.tensor([1.0, 0.0])).sum()
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
