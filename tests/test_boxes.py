import torch
from goldens import golden
from torchvision import ops

from maskset import boxes as box_ops


def random_corners(count, seed=0):
    low, size = torch.rand(2, count, 2, generator=torch.Generator().manual_seed(seed))
    return torch.cat([low, low + size], -1)


def test_formats_are_torchvisions_and_turn_back():
    corners = random_corners(20)
    centers = box_ops.to_centers(corners)
    torch.testing.assert_close(centers, ops.box_convert(corners, "xyxy", "cxcywh"))
    torch.testing.assert_close(box_ops.to_corners(centers), corners)


def test_overlaps_are_torchvisions():
    a, b = random_corners(6), random_corners(9, seed=1)
    torch.testing.assert_close(box_ops.generalized_iou(a[:, None], b[None]), ops.generalized_box_iou(a, b))
    torch.testing.assert_close(box_ops.iou(a[:, None], b[None]), ops.box_iou(a, b))
    torch.testing.assert_close(box_ops.area(a), ops.box_area(a))


def test_generalized_iou_is_the_official_one():
    boxes = box_ops.to_corners(golden("solq", "unit.boxes"))
    giou = box_ops.generalized_iou(boxes[0, :6, None], boxes[1, None, :5])
    torch.testing.assert_close(giou, golden("solq", "unit.giou"), atol=1e-6, rtol=1e-6)


def test_boxes_without_area_give_finite_overlaps_and_gradients():
    boxes = torch.zeros(3, 4, requires_grad=True)
    overlap = box_ops.generalized_iou(boxes, torch.zeros(3, 4)).sum()
    overlap.backward()
    assert overlap.isfinite()
    assert boxes.grad is not None
    assert boxes.grad.isfinite().all()


def test_clip_cuts_to_the_image():
    boxes = torch.tensor([[-5.0, 2, 50, 60], [60, 60, 70, 70]])
    assert box_ops.clip(boxes, (40, 30)).tolist() == [[0, 2, 30, 40], [30, 40, 30, 40]]
