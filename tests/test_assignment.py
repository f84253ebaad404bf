"""Task-aligned assignment against a plain loop, and its special cases."""

import pytest
import torch

from maskset import boxes as box_ops
from maskset.assignment import assign, overlap

OBJECTS = torch.tensor([[10.0, 10, 30, 30], [12, 10, 32, 30], [60, 60, 66, 66]])
LABELS = torch.tensor([0, 1, 0])


def slots(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return boxes near the objects and logits of two classes."""
    generator = torch.Generator().manual_seed(seed)
    near = OBJECTS[torch.randint(len(OBJECTS), (count,), generator=generator)]
    return near + 4 * torch.randn(count, 4, generator=generator), torch.randn(count, 2, generator=generator)


def test_an_object_gets_the_slots_with_the_greatest_product_of_score_and_iou():
    boxes, logits = slots(40)
    made = assign(logits[None], [overlap(OBJECTS, boxes)], [LABELS], 3, (0.5, 4.0), 0.3)
    quality = torch.zeros(len(OBJECTS), len(boxes))
    for t, (box, label) in enumerate(zip(OBJECTS, LABELS, strict=True)):
        for n, slot in enumerate(boxes):
            x, y = (slot[:2] + slot[2:]) / 2
            if box[0] - 4 < x < box[2] + 4 and box[1] - 4 < y < box[3] + 4:
                quality[t, n] = logits[n, label].sigmoid() ** 0.5 * box_ops.iou(box, slot) ** 4
    for t in range(len(OBJECTS)):
        expected = {}
        for n in quality[t].topk(3).indices.tolist():
            rivals = [u for u in range(len(OBJECTS)) if n in quality[u].topk(3).indices and quality[u, n] > quality[t, n]]
            expected[n] = 0 if rivals else pytest.approx(max(0.3, float(box_ops.iou(OBJECTS[t], boxes[n]))))
        expected = dict(sorted(expected.items(), key=lambda item: item[1] == 0))  # the assigned ones first
        assert dict(zip(made.slots[0, t].tolist(), made.targets[0, t].tolist(), strict=True)) == expected
        assert made.slots[0, t].tolist() == list(expected)


def test_a_slot_belongs_to_one_object():
    boxes, logits = slots(3)
    made = assign(logits[None], [overlap(OBJECTS, boxes)], [LABELS], 3, (1.0, 2.0), 0.3)
    taken = made.slots[made.targets > 0]
    assert len(taken) == len(taken.unique())


def test_an_object_that_no_slot_overlaps_teaches_none():
    boxes = torch.tensor([[10.0, 10, 30, 30], [50, 50, 50, 50]])  # the second is empty
    made = assign(torch.zeros(1, 2, 1), [overlap(OBJECTS[2:], boxes)], [torch.tensor([0])], 2, (0.5, 4.0), 0.3)
    assert not made.targets.any()


def test_images_without_objects_and_with_fewer_slots_than_asked_for():
    boxes, logits = slots(4)
    empty = overlap(OBJECTS[:0], boxes)
    made = assign(logits[None].repeat(2, 1, 1), [overlap(OBJECTS, boxes), empty], [LABELS, LABELS[:0]], 8, (0.5, 4.0), 0.3)
    assert made.slots.shape == made.targets.shape == (2, 3, 4)
    assert not made.targets[1].any()
    nothing = assign(logits[None], [empty], [LABELS[:0]], 8, (0.5, 4.0), 0.3)
    assert nothing.targets.shape == (1, 0, 4)


def test_tasks_align_by_class_too():
    boxes = OBJECTS[:1].repeat(2, 1)
    logits = torch.tensor([[2.0, -2.0], [-2.0, 2.0]])
    for label in (0, 1):
        made = assign(logits[None], [overlap(OBJECTS[:1], boxes)], [torch.tensor([label])], 1, (1.0, 2.0), 0.3)
        assert made.slots.tolist() == [[[label]]]
