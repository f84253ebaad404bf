"""What ISDA has beside its published configuration: the paper's ablations, other sizes, and its parts against plain loops."""

import pytest
import torch
import torch.nn.functional as F
from tiny import TINY, batch, shapes, tiny_config

from maskset import detection
from maskset.errors import ConfigError
from maskset.instances import Category, Instances, Masks
from maskset.masks.paint import paint_probabilities
from maskset.masks.targets import downsample_by_stride
from maskset.structures import ImageBatch, ModelOutput, SlotPredictions
from maskset.systems import build, isda
from maskset.systems.base import InputConfig
from maskset.systems.isda import Isda, IsdaConfig


def tiny(**changes) -> Isda:
    torch.manual_seed(0)
    return build(tiny_config("isda", **changes))


def step(model: Isda, count: int = 4) -> dict[str, torch.Tensor]:
    images, objects = batch(shapes(count), model.config)
    terms = model.loss(model(images), images, objects)
    torch.stack(list(terms.values())).sum().backward()
    return terms


def perfect(model: Isda, images: ImageBatch, objects: Instances) -> ModelOutput:
    """Return the output that says exactly what the objects of one image are: each has a channel of the mask features."""
    logits = torch.full((1, len(objects), model.config.num_classes), -12.0)
    logits[0, torch.arange(len(objects)), objects.labels] = 12.0
    stride = model.config.mask_stride
    size = (images.pixels.shape[2] // stride, images.pixels.shape[3] // stride)
    features = downsample_by_stride(objects.masks, stride, size).sub(0.5).mul(40)
    return ModelOutput([SlotPredictions(logits, torch.eye(len(objects))[None])], mask_features=features[None])


@pytest.mark.parametrize("stride", [2, 4, 8])
@pytest.mark.parametrize(("coordinates", "position"), [(False, False), (True, False), (False, True), (True, True)])
def test_every_ablation_trains_and_finds(stride, coordinates, position):
    model = tiny(mask_stride=stride, feature_coordinates=coordinates, kernel_position=position)
    terms = step(model, 2)
    assert all(term.isfinite() for term in terms.values())
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    images, _ = batch(shapes(2), model.config)
    output = model(images)
    assert output.mask_features.shape == (2, 24, 64 // stride, 96 // stride)
    assert output.layers[-1].mask_params.shape == (2, 12, 24)
    assert model.kernel_head.last.out_features == (22 if position else 24)
    assert [found.masks.size for found in model.postprocess(output, images, [(64, 80)] * 2)] == [(64, 80)] * 2


def test_a_kernel_ends_with_the_reference_point_before_the_sigmoid():
    model = tiny()
    images, _ = batch(shapes(2), model.config)
    for layer in model(images).layers:
        expected = model.reference_points(model.query_position)
        torch.testing.assert_close(layer.mask_params[:, :, -2:], expected.expand(2, -1, -1), atol=1e-5, rtol=0)


def test_gradient_reaches_the_reference_points_through_the_kernel_alone():
    model = tiny(decoder_layers=1)
    images, _ = batch(shapes(1), model.config)
    kernels = model(images).layers[0].mask_params
    (found,) = torch.autograd.grad(kernels[..., -2:].sum(), [model.reference_points.bias])
    torch.testing.assert_close(found, torch.tensor([12.0, 12.0]))  # the slope of each of the twelve queries is 1


def test_coordinates_move_the_masks_of_a_flat_image():
    images = ImageBatch(torch.zeros(1, 3, 64, 96), torch.tensor([[64, 96]]))
    with torch.no_grad():
        told, untold = tiny()(images).mask_features, tiny(feature_coordinates=False)(images).mask_features
    assert told[0, :, 6, 8].sub(told[0, :, 10, 16]).abs().max() > 1e-2
    assert untold.shape == told.shape


@pytest.mark.parametrize("stride", [2, 4, 8])
def test_perfect_predictions_have_almost_no_loss_and_are_detected(stride):
    model = tiny(mask_stride=stride)
    images, (objects,) = batch(shapes(1), model.config)
    output = perfect(model, images, objects)
    terms = model.loss(output, images, [objects])
    assert set(terms) == {"class", "mask"}
    assert terms["class"] < 1e-3
    assert terms["mask"] < {2: 0.15, 4: 0.3, 8: 0.6}[stride]  # a soft border is not met by a hard one
    (found,) = model.postprocess(output, images, [(64, 80)], limit=len(objects))
    assert found.labels.sort().values.tolist() == objects.labels.sort().values.tolist()
    union = objects.masks.dense().any(0)
    assert (found.masks.dense().any(0) & union).sum() / (found.masks.dense().any(0) | union).sum() > 1 - 0.05 * stride
    assert (found.boxes == found.masks.boxes()).all()


def random_output(count: int = 2, layers: int = 3, slots: int = 7) -> tuple[ModelOutput, ImageBatch, list[Instances]]:
    """Return an output of random numbers that ask for gradients, for a model of 3 classes and kernels of 24 numbers."""
    torch.manual_seed(1)
    images, objects = batch(shapes(count), TINY["isda"])
    predictions = [
        SlotPredictions(torch.randn(count, slots, 3, requires_grad=True), torch.randn(count, slots, 24, requires_grad=True))
        for _ in range(layers)
    ]
    return ModelOutput(predictions, mask_features=torch.randn(count, 24, 16, 24, requires_grad=True)), images, objects


def test_the_loss_is_that_of_a_plain_loop_and_so_are_its_gradients():
    model, (output, images, objects) = tiny(), random_output()
    terms = model.loss(output, images, objects)
    inputs = [output.mask_features, *(p for layer in output.layers for p in (layer.class_logits, layer.mask_params))]
    found = torch.autograd.grad(torch.stack(list(terms.values())).sum(), inputs)
    expected = {}
    for name, layer in zip(("/0", "/1", ""), output.layers, strict=True):
        class_loss, mask_loss, matched = torch.zeros(()), torch.zeros(()), 0
        for i, own in enumerate(objects):
            masks = torch.einsum("nd,dhw->nhw", layer.mask_params[i], output.mask_features[i]).sigmoid()
            padded = F.pad(own.masks.dense().float(), (0, 16, 0, 0))
            targets = F.interpolate(padded[None], scale_factor=0.25, mode="bilinear")[0]
            p, t = masks[:, None], targets[None]
            overlap = (p * t).sum((2, 3))
            iou = overlap / (p.sum((2, 3)) + t.sum((2, 3)) - overlap + 1e-6)
            cost = 2 * detection.focal_cost(layer.class_logits[None, i : i + 1], own.labels[None], eps=1e-12) + 3 * (1 - iou)
            pairs = detection.match(cost.detach(), [len(own)])
            wanted = torch.zeros(7, 3)
            for slot, object in zip(pairs.slot, pairs.object, strict=True):
                wanted[slot, own.labels[object]] = 1
                p, t = masks[slot], targets[object]
                mask_loss = mask_loss + 1 - 2 * (p * t).sum() / ((p * p).sum() + 0.001 + (t * t).sum() + 0.001)
                matched += 1
            probability = layer.class_logits[i].sigmoid()
            right = wanted * probability + (1 - wanted) * (1 - probability)
            class_loss = class_loss - ((0.75 - 0.5 * wanted) * (1 - right) ** 2 * right.log()).sum()
        expected |= {f"class{name}": 2 * class_loss / matched, f"mask{name}": 3 * mask_loss / (matched + 1e-5)}
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, msg=name)
    wanted = torch.autograd.grad(torch.stack(list(expected.values())).sum(), inputs)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_few_masks_at_a_time_cost_what_all_do(monkeypatch):
    model, (output, images, objects) = tiny(), random_output()
    expected = model.loss(output, images, objects)
    monkeypatch.setattr(isda, "_MAX_CELLS", 1000)  # two masks
    assert model.loss(output, images, objects) == expected


def test_the_weights_of_class_and_mask_multiply_the_terms_once_the_matches_are_the_same():
    output, images, objects = random_output()
    base = tiny().loss(output, images, objects)
    doubled = tiny(mask_weight=6.0, class_weight=4.0).loss(output, images, objects)
    for name, value in base.items():
        torch.testing.assert_close(doubled[name], 2 * value)


def test_an_image_without_objects_beside_one_with_some():
    output, images, objects = random_output()
    terms = tiny().loss(output, images, [objects[0][[]], objects[1]])
    assert all(term.isfinite() for term in terms.values())
    alone = ModelOutput(
        [SlotPredictions(p.class_logits[1:], p.mask_params[1:]) for p in output.layers], mask_features=output.mask_features[1:]
    )
    single = tiny().loss(alone, ImageBatch(images.pixels[1:], images.sizes[1:]), objects[1:])
    torch.testing.assert_close(terms["mask"], single["mask"])


def test_a_mask_without_an_object_is_scored_zero_and_comes_last():
    model = tiny()
    images, (objects,) = batch(shapes(1), model.config)
    output = perfect(model, images, objects)
    output.mask_features[0, 0] = -9.0  # the first object's
    (found,) = model.postprocess(output, images, [(64, 80)])
    assert len(found) == 3 * len(objects)
    assert (found.scores[-3:] == 0).all()  # the pairs with the three classes
    assert found.scores[-4] > 0
    assert found.masks.areas()[-1] == 0
    assert found.boxes[-1].tolist() == [0, 0, 0, 0]
    (above,) = model.postprocess(output, images, [(64, 80)], threshold=0.01)
    assert len(above) == len(objects) - 1


def test_a_score_is_the_class_times_the_mean_inside_the_mask():
    logits, kernels = torch.tensor([[2.0, -9.0]]), torch.ones(1, 1)
    features = torch.tensor([[[1.0, 3.0], [-1.0, -5.0]]])
    model = tiny(num_classes=2)
    output = ModelOutput([SlotPredictions(logits[None], kernels[None])], mask_features=features[None])
    images = ImageBatch(torch.zeros(1, 3, 8, 8), torch.tensor([[8, 8]]))
    (found,) = model.postprocess(output, images, [(8, 8)], limit=1)
    inside = torch.tensor([1.0, 3.0]).sigmoid().mean()
    assert found.scores.item() == pytest.approx(float(torch.tensor(2.0).sigmoid() * inside), rel=1e-4)


def test_masks_show_the_image_without_its_padding():
    model = tiny()
    features = torch.full((1, 1, 16, 24), -9.0)
    features[0, 0, :, 10:] = 9.0  # from pixel 40 on, of which the image shows up to 80, at half its size
    output = ModelOutput([SlotPredictions(torch.full((1, 1, 3), 9.0), torch.ones(1, 1, 1))], mask_features=features)
    images = ImageBatch(torch.zeros(1, 3, 64, 96), torch.tensor([[64, 80]]))
    (found,) = model.postprocess(output, images, [(128, 160)], limit=1)
    assert found.boxes[0].tolist() == [80, 0, 160, 128]


def test_more_than_a_hundred_results_can_be_had():
    model = tiny(num_classes=50)
    images, _ = batch(shapes(1), model.config)
    with torch.no_grad():
        output = model(images)
    sizes = [(64, 80)]
    assert len(model.postprocess(output, images, sizes, limit=300)[0]) == 300
    assert len(model.postprocess(output, images, sizes, limit=10_000)[0]) == 12 * 50


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_dim": 30}, "multiple of 4"),
        ({"hidden_dim": 36, "num_heads": 8}, "num_heads"),
        ({"num_queries": 0}, "num_queries must be at least 1, got 0"),
        ({"mask_hidden_dim": 0}, "mask_hidden_dim must be at least 1"),
        ({"mask_weight": -1.0}, "mask_weight must not be negative"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"num_levels": 2}, "num_levels must be at least 3, got 2"),
        ({"mask_dim": 2}, "mask_dim must be at least 3, got 2"),
        ({"mask_dim": 0, "kernel_position": False}, "mask_dim must be at least 1, got 0"),
        ({"mask_stride": 16}, "mask_stride must be 2, 4 or 8, got 16"),
        ({"input": InputConfig(divisor=48)}, "divisor must be a multiple of 32 for isda, got 48"),
        ({"backbone": {"norm": "frozen"}}, "pretrained"),
        ({"backbone": {"name": "resnet51"}}, "resnet51"),
    ],
)
def test_settings_that_contradict_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny(**changes)


def test_as_many_categories_as_classes_are_needed():
    with pytest.raises(ConfigError, match="num_classes is 3, but 1 categories"):
        build(TINY["isda"], [Category("cat", 1)])


def test_the_defaults_are_the_official_ones():
    config = IsdaConfig()
    assert (config.num_classes, config.hidden_dim, config.num_queries, config.mask_dim, config.mask_stride) == (
        80,
        256,
        300,
        256,
        4,
    )
    assert (config.mask_weight, config.class_weight, config.input.divisor) == (3, 2, 32)
    assert (config.feature_coordinates, config.kernel_position) == (True, True)


def test_the_start_is_the_official_one():
    torch.manual_seed(0)
    model = build(IsdaConfig())
    assert torch.allclose(model.class_head.bias, torch.tensor(-4.59512))
    finest = model.project_finest.convolutions[0].weight
    assert finest.detach().std() == pytest.approx(0.0884, rel=0.02)  # Kaiming
    bound = (6 / (512 + 256)) ** 0.5  # Xavier
    assert bound * 0.99 < model.project.convolutions[0].weight.detach().abs().max() <= bound
    in_projection = model.decoder[0].self_attention.in_proj_weight.detach()
    assert 0.0765 * 0.99 < in_projection.abs().max() < 0.0766
    assert not model.reference_points.bias.any()
    assert not model.encoder.layers[0].attention.sampling_offsets.weight.any()
    assert model.encoder.layers[0].attention.sampling_offsets.bias[:8].tolist() == [1, 0, 2, 0, 3, 0, 4, 0]
    assert model.query_content.detach().std() == pytest.approx(1, abs=0.02)
    assert model.mask_feature_head.output.convolution.weight.detach().std() == pytest.approx(0.01, rel=0.02)
    assert model.kernel_head.last.bias.any()


def test_without_objects_there_is_no_mask_loss():
    output, images, _ = random_output()
    terms = tiny().loss(output, images, [Instances.empty((64, 80))] * 2)
    assert all(terms[name] == 0 for name in ("mask", "mask/0", "mask/1"))
    assert terms["class"] > 0


def test_masks_of_no_object_are_empty():
    assert isinstance(paint_probabilities(torch.zeros(0, 16, 24), 4, (64, 80), (64, 80)), Masks)
