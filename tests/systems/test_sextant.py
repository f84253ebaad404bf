"""Sextant: how a mask is drawn, what its queries start from, and that duplicates are suppressed without NMS."""

from dataclasses import replace

import pytest
import torch
from tiny import TINY, batch, shapes, tiny_config

from maskset import boxes as box_ops
from maskset.assignment import assign
from maskset.errors import ConfigError
from maskset.instances import Category
from maskset.structures import ImageBatch, SlotPredictions
from maskset.systems import build, sextant
from maskset.systems.sextant import Sextant, SextantConfig


def tiny(**changes) -> Sextant:
    torch.manual_seed(0)
    model = build(tiny_config("sextant", **changes)).eval()
    assert isinstance(model, Sextant)
    return model


def test_cells_come_level_by_level_and_start_as_boxes_of_three_cells():
    model = tiny()
    torch.nn.init.zeros_(model.box_head.weight)
    images, _ = batch(shapes(1), model.config)  # 64 x 80, padded to 64 x 96
    dense, unique, queries = model(images).layers
    counts = [(64 // stride) * (96 // stride) for stride in (4, 8, 16, 32)]
    assert dense.class_logits.shape == (1, sum(counts), 3)
    assert torch.equal(dense.boxes, unique.boxes)
    first = torch.tensor([0, *torch.tensor(counts).cumsum(0)[:-1].tolist()])
    sizes = dense.boxes[0, first, 2:] * torch.tensor([80.0, 64])
    for size, stride in zip(sizes, (4, 8, 16, 32), strict=True):
        assert size.tolist() == pytest.approx([3 * stride] * 2)
    assert (dense.boxes[0, first, :2] * torch.tensor([80.0, 64])).flatten().tolist() == pytest.approx([2, 2, 4, 4, 8, 8, 16, 16])
    assert queries.class_logits.shape == (1, model.config.num_queries, 3)


def test_cells_on_the_padding_never_become_queries():
    model = tiny(num_queries=400)
    images, _ = batch(shapes(1), model.config)
    _, unique, queries = model(images).layers
    assert int((unique.class_logits.amax(2) == -20).sum()) == 16 * 4 + 8 * 2 + 4 * 1  # stride 32: its third cell is inside
    assert (queries.class_logits > -15).all()  # 426 of the 510 cells are inside


def test_queries_are_the_best_cells_with_the_mean_logits_of_both_heads_less_the_penalty_of_duplicates():
    model = tiny()
    images, _ = batch(shapes(1), model.config)
    dense, unique, queries = model(images).layers
    best = unique.class_logits.amax(2).topk(model.config.num_queries, 1).indices[0]
    torch.testing.assert_close(queries.boxes[0], unique.boxes[0, best])
    torch.testing.assert_close(queries.mask_params[0], unique.mask_params[0, best])
    change = (unique.class_logits + dense.class_logits)[0, best] / 2 - queries.class_logits[0]
    torch.testing.assert_close(change, change[:, :1].expand(-1, 3))
    corners = box_ops.to_corners(queries.boxes[0])
    iou = box_ops.iou(corners[:, None], corners).tril(-1)
    label = unique.class_logits[0, best].argmax(1)
    overlap = (iou * (label[:, None] == label)).amax(1)
    torch.testing.assert_close(change[:, 0], 3 * overlap**2, atol=1e-5, rtol=0)


def test_duplicates_are_suppressed_and_neighbors_are_not():
    model = tiny()
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.505, 0.5, 0.2, 0.2], [0.66, 0.5, 0.2, 0.2]]])
    logits = torch.tensor([[[3.0, -5, -5], [2.5, -5, -5], [2.0, -5, -5]]])
    cells = SlotPredictions(logits, torch.zeros(1, 3, model.config.hidden_dim), boxes)
    changed = model._queries(cells, cells).class_logits[0, :, 0]
    assert (logits[0, :, 0] - changed).tolist() == pytest.approx([0, 2.7, 0.04], abs=0.1)


def test_boxes_are_in_single_precision_under_autocast_and_in_a_model_in_half_precision():
    model = tiny()
    torch.nn.init.zeros_(model.box_head.weight)
    images = ImageBatch(torch.randn(1, 3, 64, 1024), torch.tensor([[64, 1024]]))  # bfloat16 has no 255.5
    exact = model(images).layers[0].boxes
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(images).layers[0].boxes
    torch.testing.assert_close(rounded, exact)
    half = model.bfloat16()(replace(images, pixels=images.pixels.bfloat16())).layers[0].boxes
    torch.testing.assert_close(half[..., :2], exact[..., :2])


def test_a_mask_is_a_small_network_of_samples_and_positions():
    model = tiny()
    settings, generator = model.config, torch.Generator().manual_seed(1)
    features = torch.randn(2, settings.mask_dim, 32, 48, generator=generator)
    vectors = torch.randn(3, settings.hidden_dim, generator=generator)
    image = torch.tensor([0, 1, 1])
    boxes = torch.tensor([[10.0, 10, 40, 50], [20, 4, 30, 12], [-8, 30, 30, 70]])
    drawn = model.draw_masks(features, image, vectors, boxes)
    assert drawn.shape == (3, settings.mask_size, settings.mask_size)
    kernels = model.kernel_head(vectors)
    size, hidden, width = settings.mask_size, settings.mask_hidden_dim, settings.mask_dim + 2
    for n, i, j in ((0, 3, 15), (1, 10, 10), (2, 7, 19)):
        x0, y0, x1, y1 = model.region(boxes)[n].tolist()
        x, y = x0 + (j + 0.5) * (x1 - x0) / size, y0 + (i + 0.5) * (y1 - y0) / size
        grid = torch.tensor([[[[x / 48 - 1, y / 32 - 1]]]])  # the canvas is 96 x 64 pixels
        sample = torch.nn.functional.grid_sample(features[image[n]][None], grid, align_corners=False, padding_mode="border")
        center, half = (boxes[n, :2] + boxes[n, 2:]) / 2, (boxes[n, 2:] - boxes[n, :2]) / 2
        inputs = torch.cat([sample.flatten(), (torch.tensor([x, y]) - center) / half])
        weights = kernels[n, : hidden * width].view(hidden, width)
        biases, output = kernels[n, hidden * width :].split([hidden, hidden + 1])
        expected = (weights @ inputs + biases).relu() @ output[:-1] + output[-1]
        torch.testing.assert_close(drawn[n, i, j], expected, atol=1e-4, rtol=1e-4)


def test_many_cells_learn_from_an_object_and_one_of_them_to_report_it(monkeypatch):
    assignments = []

    def record(*arguments):
        assignments.append(assign(*arguments))
        return assignments[-1]

    monkeypatch.setattr(sextant, "assign", record)
    model = tiny(num_queries=400).train()
    images, objects = batch(shapes(2), model.config)
    model.loss(model(images), images, objects)
    dense, unique = ((assignment.targets > 0).sum(2) for assignment in assignments)
    assert dense.max() == model.config.positives
    assert unique.sum() == sum(map(len, objects))


def test_cells_on_the_padding_learn_from_no_object(monkeypatch):
    assignments = []
    monkeypatch.setattr(sextant, "assign", lambda *arguments: assignments.append(assign(*arguments)) or assignments[-1])
    model = tiny(positives=40).train()
    images, objects = batch(shapes(1), model.config)  # 64 x 80, padded to 64 x 96
    corner = replace(objects[0][[0]], boxes=torch.tensor([[76.0, 60, 80, 64]]))
    output = model(images)
    model.loss(output, images, [corner])
    learning = assignments[0].slots[assignments[0].targets > 0]
    assert 0 < len(learning) < 40
    assert (output.layers[0].class_logits[0, learning].amax(1) > -20).all()


def test_boxes_that_are_not_finite_give_a_mask_but_no_crash():
    model = tiny()
    features, boxes = torch.zeros(1, model.config.mask_dim, 32, 48), torch.full((1, 4), torch.nan)
    drawn = model.draw_masks(features, torch.tensor([0]), torch.zeros(1, model.config.hidden_dim), boxes)
    assert drawn.shape[1:] == (model.config.mask_size,) * 2


def test_masks_cannot_learn_from_more_cells_than_an_object_has():
    with pytest.raises(ConfigError, match=r"model\.mask_positives must be at most positives \(1\), got 2"):
        replace(TINY["sextant"], positives=1)


def test_a_backbone_without_a_map_of_stride_2_is_refused():
    with pytest.raises(ConfigError, match="swin_tiny"):
        build(SextantConfig(backbone=replace(SextantConfig().backbone, name="swin_tiny", frozen_stages=0)))


def test_the_heads_that_have_a_row_per_class_are_named_for_fine_tuning():
    model = build(tiny_config("sextant", num_classes=5), tuple(Category(str(i), i) for i in range(5)))
    rows = {name.rpartition(".")[0] for name, value in model.state_dict().items() if len(value.shape) and value.shape[0] == 5}
    assert rows == set(model.CLASS_PARTS)
