"""What SOTR has beside its published configuration: the paper's variants, and its parts against plain loops."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import TINY, batch, shapes, tiny_config

from maskset import distributed
from maskset.errors import ConfigError
from maskset.instances import Category, Instances, Masks
from maskset.layers.resnet import DeformableConvolution
from maskset.masks.targets import downsample_by_4_opencv
from maskset.structures import ImageBatch, ModelOutput, SlotPredictions
from maskset.systems import build, sotr
from maskset.systems.base import BackboneConfig, InputConfig
from maskset.systems.sotr import Sotr, SotrConfig, assign, point_nms

GRIDS = TINY["sotr"].grids
CELLS = sum(side**2 for side in GRIDS)


def tiny(**changes) -> Sotr:
    torch.manual_seed(0)
    return build(tiny_config("sotr", **changes))


def step(model: Sotr, count: int = 4) -> dict[str, torch.Tensor]:
    images, objects = batch(shapes(count), model.config)
    terms = model.loss(model(images), images, objects)
    torch.stack(list(terms.values())).sum().backward()
    return terms


# The paper's variants


@pytest.mark.parametrize("transformer", ["released", "pure-twin", "hybrid-twin", "full"])
@pytest.mark.parametrize("substituted", ["none", "p5", "p4+p5"])
def test_every_variant_trains_and_finds(transformer, substituted):
    model = tiny(transformer=transformer, substituted=substituted, depth=1)
    sizes = []
    model.transformer.register_forward_hook(lambda _m, _i, out: sizes.append(tuple(out.shape[2:])))
    terms = step(model, 2)
    assert sizes == [(side, side) for side in GRIDS] + {"none": [], "p5": [(2, 3)], "p4+p5": [(4, 6), (2, 3)]}[substituted]
    assert all(term.isfinite() for term in terms.values())
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    images, _ = batch(shapes(2), model.config)
    output = model(images)
    assert output.layers[0].class_logits.shape == (2, CELLS, 3)
    assert output.layers[0].mask_params.shape == (2, CELLS, 24)
    assert output.mask_features.shape == (2, 24, 16, 24)
    assert [found.masks.size for found in model.postprocess(output, images, [(64, 80)] * 2)] == [(64, 80)] * 2


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({"transformer": "full"}, 38_031_120),
        ({"transformer": "pure-twin"}, 41_179_920),
        ({"transformer": "hybrid-twin"}, 49_035_024),
        ({"transformer": "hybrid-twin", "depth": 6}, 38_799_120),
        ({"transformer": "hybrid-twin", "depth": 2}, 31_975_184),
        ({"depth": 2}, 34_310_000),
    ],
)
def test_every_variant_has_the_parameters_of_its_parts(changes, count):
    model = build(SotrConfig(**changes))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(count, abs=5_000 if "transformer" not in changes else 0)


def test_without_a_transformer_the_heads_read_the_pyramid():
    model = tiny(depth=0)
    step(model, 1)
    level = torch.randn(1, 32, 3, 5)
    assert torch.equal(model.transformer(level), level)


def test_an_image_that_is_not_square_is_seen_by_square_grids():
    model, seen = tiny(), []
    model.transformer.register_forward_hook(lambda _m, given, _o: seen.append(given[0]))
    images = ImageBatch(torch.randn(1, 3, 64, 160), torch.tensor([[64, 160]]))
    with torch.no_grad():
        model(images)
        p3 = model.pyramid(model.backbone(images.pixels))[1]
    torch.testing.assert_close(seen[1], F.interpolate(p3, size=(8, 8), mode="bilinear"))


def test_deformable_convolutions_and_strides_can_be_chosen():
    model = tiny(backbone={"name": "resnet26", "deformable_stages": 2, "stride_in_first": True}, depth=1)
    assert sum(isinstance(module, DeformableConvolution) for module in model.modules()) == 4
    assert model.backbone.body.layer2[0].conv1.stride == (2, 2)
    assert model.backbone.stride_in_first
    assert all(term.isfinite() for term in step(model, 1).values())
    assert tiny(backbone={"name": "resnet26"}).backbone.stride_in_first is False


# Targets


def slow_pairs(found: Instances, size: tuple[int, int], config: SotrConfig) -> tuple[list[tuple[int, int]], list[int]]:
    """Return pairs of cell and object, and the object whose class each cell has, one object and one cell at a time."""
    f = np.float32
    height, width = f(4 * size[0]), f(4 * size[1])
    pairs, classes, before = [], [-1] * sum(side**2 for side in config.grids), 0
    for side, low, high in zip(config.grids, config.scale_from, config.scale_to, strict=True):
        for index, (box, mask) in enumerate(zip(found.boxes.numpy(), found.masks.dense().numpy(), strict=True)):
            w, h = box[2] - box[0], box[3] - box[1]
            y, x = np.nonzero(mask)
            if not low <= np.sqrt(w * h) <= high or not len(x):
                continue
            center_y, center_x = f(y.sum()) / f(len(y)), f(x.sum()) / f(len(x))

            def cell(position: np.float32, length: np.float32, side: int = side) -> int:
                return int((position / length) // f(1 / side))

            half_w, half_h = f(0.5) * w * f(config.center_fraction), f(0.5) * h * f(config.center_fraction)
            row, column = cell(center_y, height), cell(center_x, width)
            top = max(max(0, cell(center_y - half_h, height)), row - 1)
            down = min(min(side - 1, cell(center_y + half_h, height)), row + 1)
            left = max(column - 1, max(0, cell(center_x - half_w, width)))
            right = min(min(side - 1, cell(center_x + half_w, width)), column + 1)
            for i in range(top, down + 1):
                for j in range(left, right + 1):
                    pairs.append((before + i * side + j, index))
                    classes[before + i * side + j] = index
        before += side**2
    return pairs, classes


def boxes_of_all_sizes(count: int, size: tuple[int, int], seed: int) -> Instances:
    """Return rectangles, some of them empty masks, some with boxes that are not theirs."""
    generator = np.random.default_rng(seed)
    masks = torch.zeros(count, *size, dtype=torch.bool)
    for mask in masks:
        y, x = generator.integers(0, size[0]), generator.integers(0, size[1])
        h, w = generator.integers(0, size[0]), generator.integers(0, size[1])
        mask[y : y + h, x : x + w] = True
    found = Masks.from_dense(masks)
    boxes = found.boxes() + torch.from_numpy(generator.integers(-1, 2, (count, 1))).float()
    return Instances(torch.from_numpy(generator.integers(0, 3, count)), boxes, found)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_objects_belong_to_the_cells_of_the_papers_code(seed, share):
    settings = dataclasses.replace(TINY["sotr"], center_fraction=share, grids=(20, 16, 10, 7, 3))
    found = boxes_of_all_sizes(40, (60, 77), seed)
    pairs, classes = slow_pairs(found, (16, 24), settings)
    assigned = assign(found, (16, 24), settings)
    assert list(zip(assigned.cells.tolist(), assigned.objects.tolist(), strict=True)) == pairs
    assert assigned.object_of_slot(len(classes)).tolist() == classes
    assert len(pairs) > 40
    assert len({cell for cell, _ in pairs}) < len(pairs) or share == 0


def test_a_center_on_the_border_of_two_cells_is_assigned_as_in_float32():
    settings = dataclasses.replace(TINY["sotr"], grids=(40, 36, 24, 16, 12), scale_from=(1,) * 5, scale_to=(99,) * 5)
    masks = torch.zeros(60, 1, 61, dtype=torch.bool)
    masks[torch.arange(60), 0, torch.arange(60)] = True  # the center of column x is at x
    found = Instances(torch.zeros(60, dtype=torch.int64), Masks.from_dense(masks).boxes(), Masks.from_dense(masks))
    for width in (16, 18, 20, 24, 30):
        pairs, _ = slow_pairs(found, (1, width), settings)
        assigned = assign(found, (1, width), settings)
        assert list(zip(assigned.cells.tolist(), assigned.objects.tolist(), strict=True)) == pairs


def test_scales_include_both_ends():
    masks = Masks.from_dense(torch.ones(1, 64, 96, dtype=torch.bool))
    for side, grids in ((15.5, [0, 1]), (16, [0, 1, 2]), (24, [1, 2, 3]), (97, [])):
        found = Instances(torch.tensor([0]), torch.tensor([[0.0, 0, side, side]]), masks)
        starts = torch.tensor([0, *(side**2 for side in GRIDS)]).cumsum(0)
        cells = assign(found, (16, 24), TINY["sotr"]).cells
        assert sorted(set((torch.searchsorted(starts, cells, right=True) - 1).tolist())) == grids


# Losses


def random_output(count: int = 2) -> tuple[ModelOutput, ImageBatch, list[Instances]]:
    """Return an output of random numbers that ask for gradients."""
    torch.manual_seed(1)
    images, objects = batch(shapes(count), TINY["sotr"])
    layer = SlotPredictions(torch.randn(count, CELLS, 3, requires_grad=True), torch.randn(count, CELLS, 24, requires_grad=True))
    return ModelOutput([layer], mask_features=torch.randn(count, 24, 16, 24, requires_grad=True)), images, objects


def inputs(output: ModelOutput) -> list[torch.Tensor]:
    return [output.mask_features, output.layers[0].class_logits, output.layers[0].mask_params]


def plain_loss(output: ModelOutput, objects: list[Instances]) -> dict[str, torch.Tensor]:
    (layer,) = output.layers
    dice, class_loss, positive = [], torch.zeros(()), 0
    for i, own in enumerate(objects):
        pairs, classes = slow_pairs(own, (16, 24), TINY["sotr"])
        targets = downsample_by_4_opencv(own.masks, (16, 24)).float()
        for cell, index in pairs:
            p = torch.einsum("d,dhw->hw", layer.mask_params[i, cell], output.mask_features[i]).sigmoid()
            t = targets[index]
            dice.append(1 - 2 * (p * t).sum() / ((p * p).sum() + 0.001 + (t * t).sum() + 0.001))
        wanted = torch.zeros(CELLS, 3)
        for cell, index in enumerate(classes):
            if index >= 0:
                wanted[cell, own.labels[index]] = 1
                positive += 1
        probability = layer.class_logits[i].sigmoid()
        right = wanted * probability + (1 - wanted) * (1 - probability)
        class_loss = class_loss - ((0.75 - 0.5 * wanted) * (1 - right) ** 2 * right.log()).sum()
    return {"class": class_loss / (positive + 1), "mask": 3 * torch.stack(dice).mean()}


def test_the_loss_is_that_of_a_plain_loop_and_so_are_its_gradients():
    output, images, objects = random_output()
    terms, wanted = tiny().loss(output, images, objects), plain_loss(output, objects)
    assert terms.keys() == wanted.keys()
    found = torch.autograd.grad(torch.stack(list(terms.values())).sum(), inputs(output))
    expected = torch.autograd.grad(torch.stack(list(wanted.values())).sum(), inputs(output))
    for name in terms:
        torch.testing.assert_close(terms[name], wanted[name], atol=1e-5, rtol=1e-5)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_few_masks_at_a_time_cost_what_all_do(monkeypatch):
    output, images, objects = random_output()
    expected = tiny().loss(output, images, objects)
    monkeypatch.setattr(sotr, "_MAX_CELLS", 1000)  # two masks
    for name, term in tiny().loss(output, images, objects).items():
        torch.testing.assert_close(term, expected[name])


def test_the_weights_multiply_the_terms():
    output, images, objects = random_output()
    base = tiny().loss(output, images, objects)
    doubled = tiny(mask_weight=6.0, class_weight=2.0).loss(output, images, objects)
    for name, value in base.items():
        torch.testing.assert_close(doubled[name], 2 * value)


def test_an_image_without_objects_beside_one_with_some():
    output, images, objects = random_output()
    terms = tiny().loss(output, images, [objects[0][[]], objects[1]])
    (layer,) = output.layers
    alone = ModelOutput([SlotPredictions(layer.class_logits[1:], layer.mask_params[1:])], mask_features=output.mask_features[1:])
    single = tiny().loss(alone, ImageBatch(images.pixels[1:], images.sizes[1:]), objects[1:])
    torch.testing.assert_close(terms["mask"], single["mask"])
    assert terms["class"] > single["class"]


def test_without_any_pair_there_is_no_mask_loss_and_everything_still_has_a_gradient():
    output, images, _ = random_output()
    terms = tiny().loss(output, images, [Instances.empty((64, 80))] * 2)
    assert terms["mask"] == 0
    assert terms["class"] > 0
    for gradient in torch.autograd.grad(torch.stack(list(terms.values())).sum(), inputs(output)):
        assert gradient.isfinite().all()


def test_processes_share_their_divisors(monkeypatch):
    output, images, objects = random_output()
    alone = tiny().loss(output, images, objects)
    pairs = [assign(found, (16, 24), TINY["sotr"]) for found in objects]
    cells = sum(int((own.object_of_slot(CELLS) >= 0).sum()) for own in pairs)
    drawn = sum(len(own.cells) for own in pairs)
    other = iter([30.5, 50.0])  # another process has 30 cells and 50 pairs
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "divisor", lambda count, like: torch.tensor((count + next(other)) / 2))
    terms = tiny().loss(output, images, objects)
    torch.testing.assert_close(terms["class"], alone["class"] * (cells + 1) / ((cells + 30 + 1) / 2))
    torch.testing.assert_close(terms["mask"], alone["mask"] * drawn / ((drawn + 50) / 2))


# Results


def test_point_nms_is_that_of_a_plain_loop():
    torch.manual_seed(0)
    scores = torch.rand(2, 5 * 5 + 3 * 3, 4).mul(6).round()  # with ties
    found, start = point_nms(scores, (5, 3)), 0
    for side in (5, 3):
        square = scores[:, start : start + side**2].view(2, side, side, 4)
        kept = found[:, start : start + side**2].view(2, side, side, 4)
        for i in range(side):
            for j in range(side):
                around = square[:, max(0, i - 1) : i + 1, max(0, j - 1) : j + 1].amax((1, 2))
                assert torch.equal(kept[:, i, j], square[:, i, j] * (square[:, i, j] >= around))
        start += side**2


def plain_candidates(model: Sotr, scores, kernels, features, count: int) -> list[tuple[float, int, int]]:
    """Return score, cell and class of the best pairs, all masks drawn."""
    least = [area for side, area in zip(GRIDS, (8, 8, 16, 32, 32), strict=True) for _ in range(side**2)]
    rows = []
    for cell, kernel in enumerate(kernels):
        drawn = torch.einsum("d,dhw->hw", kernel, features).sigmoid()
        inside = drawn > 0.5
        if inside.sum() > least[cell]:
            for label, score in enumerate(scores[cell].tolist()):
                if score > model.config.score_threshold:
                    rows.append((score * drawn[inside].mean().item(), cell, label))
    return sorted(rows, reverse=True)[:count]


@pytest.mark.parametrize("count", [1, 20, 400])
@pytest.mark.parametrize("few", [384, 3 * 384, 10**9])
def test_the_best_candidates_are_those_of_all_masks(monkeypatch, count, few):
    torch.manual_seed(0)
    model = tiny(score_threshold=0.3)
    scores, kernels, features = torch.rand(CELLS, 3), 0.4 * torch.randn(CELLS, 24), torch.randn(24, 16, 24)
    drawings = []
    monkeypatch.setattr(sotr, "_MAX_CELLS", few)
    monkeypatch.setattr(sotr, "dynamic_conv", lambda f, k: drawings.append(len(k)) or torch.einsum("dhw,nd->nhw", f, k))
    found = model._candidates(scores, kernels, features, count)
    expected = plain_candidates(model, scores, kernels, features, count)
    torch.testing.assert_close(found.scores, torch.tensor([row[0] for row in expected]))
    assert found.cells.tolist() == [row[1] for row in expected]
    assert found.labels.tolist() == [row[2] for row in expected]
    for cell, mask in zip(found.cells, found.masks, strict=True):
        assert torch.equal(mask, torch.einsum("d,dhw->hw", kernels[cell], features).sigmoid() > 0.5)
    if count == 1 and few == 384:
        assert sum(drawings) < CELLS / 2  # no other mask could have come in


def perfect(objects: Instances, cells: list[int]) -> ModelOutput:
    """Return the output that says what the objects of one image are, each in the cells from its own on."""
    logits, kernels = torch.full((1, CELLS, 3), -12.0), torch.zeros(1, CELLS, len(objects))
    for i, cell in enumerate(cells):
        logits[0, cell, objects.labels[i]] = 6.0 - 0.1 * i
        kernels[0, cell, i] = 1.0
    features = downsample_by_4_opencv(objects.masks, (16, 24)).float().sub(0.5).mul(40)
    return ModelOutput([SlotPredictions(logits, kernels)], mask_features=features[None])


def test_the_truth_is_found_with_boxes_around_its_masks():
    model = tiny(score_threshold=0.1, final_score_threshold=0.05)
    images, (objects,) = batch(shapes(1), model.config)
    cells = list(range(0, 2 * len(objects), 2))
    (found,) = model.postprocess(perfect(objects, cells), images, [(64, 80)])
    assert found.labels.tolist() == objects.labels.tolist()
    assert (found.scores > 0.9).all()
    assert torch.equal(found.boxes, found.masks.boxes())
    wanted = objects.masks.dense()
    assert ((found.masks.dense() & wanted).sum((1, 2)) / (found.masks.dense() | wanted).sum((1, 2)) > 0.7).all()


def test_the_loss_of_the_truth_is_nearly_nothing():
    model = tiny()
    images, (objects,) = batch(shapes(1), model.config)
    objects = objects[:1]
    pairs = assign(objects, (16, 24), model.config)
    logits, kernels = torch.full((1, CELLS, 3), -12.0), torch.zeros(1, CELLS, 1)
    logits[0, pairs.cells, objects.labels[0]] = 12.0
    kernels[0, pairs.cells] = 1.0
    features = downsample_by_4_opencv(objects.masks, (16, 24)).float().sub(0.5).mul(40)[None]
    terms = model.loss(ModelOutput([SlotPredictions(logits, kernels)], mask_features=features), images, [objects])
    assert terms["class"] < 1e-3
    assert terms["mask"] < 1e-3


@pytest.mark.parametrize(("nms", "left"), [("gaussian", np.exp(-2)), ("linear", 0.0), ("greedy", None)])
def test_a_duplicate_loses_what_the_nms_takes(nms, left):
    model = tiny(score_threshold=0.1, final_score_threshold=0.0, nms=nms)
    images, (objects,) = batch(shapes(1), model.config)
    twice = objects[[0, 0]]
    (found,) = model.postprocess(perfect(twice, [3, 30]), images, [(64, 80)])
    alone = torch.tensor([6.0, 5.9]).sigmoid()
    wanted = alone[:1] if left is None else torch.stack([alone[0], left * alone[1]])
    torch.testing.assert_close(found.scores, wanted, atol=1e-4, rtol=0)


def test_detections_below_a_threshold_are_left_out():
    images, (objects,) = batch(shapes(1), TINY["sotr"])
    output, sizes = perfect(objects[[0, 0]], [3, 30]), [(64, 80)]
    lost = float(np.exp(-2) * torch.tensor(5.9).sigmoid())
    for threshold, count in ((lost - 0.01, 2), (lost + 0.01, 1)):
        assert len(tiny(score_threshold=0.1, final_score_threshold=threshold).postprocess(output, images, sizes)[0]) == count
        assert len(tiny(score_threshold=0.1).postprocess(output, images, sizes, threshold=threshold)[0]) == count
    (nothing,) = tiny(score_threshold=0.999).postprocess(output, images, sizes)
    assert (len(nothing), nothing.masks.size, nothing.scores.shape) == (0, (64, 80), (0,))


def test_a_mask_must_exceed_the_stride_of_its_level():
    model = tiny(score_threshold=0.1)
    images = ImageBatch(torch.zeros(1, 3, 64, 96), torch.tensor([[64, 80]]))
    for grid, least in enumerate((8, 8, 16, 32, 32)):
        for area, count in ((least, 0), (least + 1, 1)):
            logits, kernels = torch.full((1, CELLS, 3), -12.0), torch.ones(1, CELLS, 1)
            logits[0, sum(side**2 for side in GRIDS[:grid]), 1] = 3.0
            features = torch.full((1, 1, 16, 24), -9.0)
            features.view(-1)[:area] = 9.0
            output = ModelOutput([SlotPredictions(logits, kernels)], mask_features=features)
            assert len(model.postprocess(output, images, [(64, 80)])[0]) == count


def test_masks_show_the_image_without_its_padding_at_any_size_of_the_canvas():
    """The official code upsamples by ceil(height / cells), which is 3 for 160 pixels on a canvas of 256; here it is always 4."""
    model = tiny(score_threshold=0.1)
    logits = torch.full((1, CELLS, 3), -12.0)
    logits[0, 0, 0] = 3.0
    features = torch.full((1, 1, 64, 64), -9.0)
    features[0, 0, :, 10:] = 9.0  # from pixel 40 on
    output = ModelOutput([SlotPredictions(logits, torch.ones(1, CELLS, 1))], mask_features=features)
    images = ImageBatch(torch.zeros(1, 3, 256, 256), torch.tensor([[160, 80]]))
    (found,) = model.postprocess(output, images, [(320, 160)])
    assert found.boxes[0].tolist() == [80, 0, 160, 320]


def test_more_than_a_hundred_results_can_be_had():
    model = tiny(num_classes=50, nms="linear", nms_candidates=3000)
    images, _ = batch(shapes(1), model.config)
    with torch.no_grad():
        output = model(images)
        output.layers[0].mask_params.copy_(torch.randn_like(output.layers[0].mask_params))
    assert len(model.postprocess(output, images, [(64, 80)], limit=300)[0]) == 300
    assert len(model.postprocess(output, images, [(64, 80)], limit=3000)[0]) > 1000


# Settings


def test_weights_of_the_hub_with_pixels_of_another_scale_are_refused():
    with pytest.raises(ConfigError, match="stride_in_first false starts from timm's hub, whose weights need"):
        SotrConfig(backbone=BackboneConfig())
    assert SotrConfig(backbone=BackboneConfig(), input=InputConfig(divisor=32)).backbone.pretrained


def test_candidates_that_are_not_finite_do_not_move_the_others():
    model = tiny(nms="linear").eval()
    images, _ = batch(shapes(1), model.config)
    with torch.no_grad():
        output = model(images)
        kernels = output.layers[0].mask_params
        kernels.copy_(torch.randn_like(kernels))
        (before,) = model.postprocess(output, images, [(64, 80)], limit=1000)
        kernels[0, 0] = torch.nan
        (after,) = model.postprocess(output, images, [(64, 80)], limit=1000)
    assert after.scores.isfinite().all()
    assert abs(len(before) - len(after)) <= 3 * 3
    assert before.scores[0] >= after.scores[0] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_dim": 36, "num_heads": 8}, r"hidden_dim must be a multiple of num_heads \(8\), got 36"),
        ({"mask_dim": 0}, "mask_dim must be at least 1, got 0"),
        ({"nms_candidates": 0}, "nms_candidates must be at least 1"),
        ({"depth": -1}, "depth must not be negative, got -1"),
        ({"mask_weight": -1.0}, "mask_weight must not be negative"),
        ({"score_threshold": 1.5}, r"score_threshold must be in \[0, 1\], got 1.5"),
        ({"scale_to": (4, 24, 32, 48, 96)}, "scale_from and scale_to leave a gap"),
        ({"grids": (10, 8, 6)}, r"grids must be 5 numbers, got \(10, 8, 6\)"),
        ({"grids": (10, 8, 6, 4, 0)}, "grids must be at least 1, got 0"),
        ({"scale_from": (1, 2)}, "scale_from must be 5 numbers"),
        ({"scale_from": (99, 99, 99, 99, 99)}, "scale_from must not exceed scale_to"),
        ({"backbone": {"deformable_stages": 5}}, r"model.backbone.deformable_stages must be in \[0, 4\], got 5"),
        ({"backbone": {"deformable_stages": 1}}, "'resnet10t' has no bottlenecks: .* or model.backbone.deformable_stages 0"),
        ({"backbone": {"stride_in_first": True}}, "model.backbone.stride_in_first false"),
        ({"input": InputConfig(divisor=48)}, "divisor must be a multiple of 32 for sotr, got 48"),
        ({"backbone": {"norm": "frozen"}}, "pretrained"),
        ({"backbone": {"name": "resnet51"}}, "resnet51"),
    ],
)
def test_settings_that_contradict_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny(**changes)


def test_as_many_categories_as_classes_are_needed():
    with pytest.raises(ConfigError, match="num_classes is 3, but 1 categories"):
        build(TINY["sotr"], [Category("cat", 1)])


def test_the_defaults_are_the_official_ones():
    config = SotrConfig()
    assert sum(side**2 for side in config.grids) == 3872
    assert (config.transformer, config.depth, config.substituted) == ("released", 12, "p5")
    assert (config.score_threshold, config.nms, config.nms_candidates, config.final_score_threshold) == (
        0.1,
        "gaussian",
        500,
        0.05,
    )
    assert (config.input.short_side, config.input.long_side, config.input.channel_order) == (1000, 1333, "bgr")


def test_pixels_are_bgr_less_the_mean_and_not_scaled():
    pixels = torch.zeros(3, 32, 32, dtype=torch.uint8)
    pixels[0] = 200
    seen = ImageBatch.from_images([pixels], 32).normalized(SotrConfig().input).pixels[0, :, 0, 0]
    torch.testing.assert_close(seen, torch.tensor([-103.53, -116.28, 200 - 123.675]), atol=1e-4, rtol=0)


def test_the_start_is_the_official_one():
    model = build(SotrConfig())
    assert torch.allclose(model.class_head.bias, torch.tensor(-4.59512))
    assert model.class_head.weight.abs().max() <= 1 / 16
    assert not any(layer.gates.any() for layer in model.transformer.layers)
    assert model.mask_feature_head.output.convolution.weight.detach().std().item() == pytest.approx(0.01, rel=0.02)
    assert model.backbone.body.layer3[0].conv1.stride == (2, 2)
