"""Task-aligned assignment against a plain loop, and its special cases."""

import pytest
import torch

from maskset import boxes as box_ops
from maskset.assignment import Overlaps, assign

OBJECTS = torch.tensor([[10.0, 10, 30, 30], [12, 10, 32, 30], [60, 60, 66, 66]])
LABELS = torch.tensor([0, 1, 0])


def slots(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return boxes near the objects and logits of two classes."""
    generator = torch.Generator().manual_seed(seed)
    near = OBJECTS[torch.randint(len(OBJECTS), (count,), generator=generator)]
    return near + 4 * torch.randn(count, 4, generator=generator), torch.randn(count, 2, generator=generator)


def test_an_object_gets_the_slots_with_the_greatest_product_of_score_and_iou():
    boxes, logits = slots(40)
    found = assign(logits[None], [Overlaps(boxes, OBJECTS)], [LABELS], 3, (0.5, 4.0), 0.3)
    quality = torch.zeros(len(OBJECTS), len(boxes))
    for t, (box, label) in enumerate(zip(OBJECTS, LABELS, strict=True)):
        for n, slot in enumerate(boxes):
            x, y = (slot[:2] + slot[2:]) / 2
            if box[0] - 4 < x < box[2] + 4 and box[1] - 4 < y < box[3] + 4:
                quality[t, n] = logits[n, label].sigmoid() ** 0.5 * box_ops.iou(box, slot) ** 4
    for t in range(len(OBJECTS)):
        chosen = quality[t].topk(3).indices
        assert found.slots[0, t].tolist() == chosen.tolist()
        for n, target in zip(chosen.tolist(), found.targets[0, t].tolist(), strict=True):
            rivals = [u for u in range(len(OBJECTS)) if n in quality[u].topk(3).indices and quality[u, n] > quality[t, n]]
            expected = 0 if rivals else max(0.3, float(box_ops.iou(OBJECTS[t], boxes[n])))
            assert target == pytest.approx(expected)


def test_a_slot_belongs_to_one_object():
    boxes, logits = slots(3)
    found = assign(logits[None], [Overlaps(boxes, OBJECTS)], [LABELS], 3, (1.0, 2.0), 0.3)
    taken = found.slots[found.targets > 0]
    assert len(taken) == len(taken.unique())


def test_without_any_overlap_the_nearest_slot_learns():
    boxes = torch.tensor([[61.0, 61, 61.5, 61.5], [62.5, 62.5, 63.5, 63.5], [0, 0, 1, 1]])
    objects = torch.tensor([[60.0, 60, 66, 66]])
    overlaps = Overlaps(boxes, objects)
    overlaps.iou = overlaps.iou * 0
    found = assign(torch.zeros(1, 3, 1), [overlaps], [torch.tensor([0])], 1, (0.5, 4.0), 0.3)
    assert found.slots.tolist() == [[[1]]]
    assert found.targets.tolist() == [[[pytest.approx(0.3)]]]


def test_images_without_objects_and_with_fewer_slots_than_asked_for():
    boxes, logits = slots(4)
    empty = Overlaps(boxes, OBJECTS[:0])
    found = assign(logits[None].repeat(2, 1, 1), [Overlaps(boxes, OBJECTS), empty], [LABELS, LABELS[:0]], 8, (0.5, 4.0), 0.3)
    assert found.slots.shape == found.targets.shape == (2, 3, 4)
    assert not found.targets[1].any()
    nothing = assign(logits[None], [empty], [LABELS[:0]], 8, (0.5, 4.0), 0.3)
    assert nothing.targets.shape == (1, 0, 4)
