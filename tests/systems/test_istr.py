"""What ISTR has beside its published configuration: the ablations of table 1, and where this code is safer."""

import dataclasses

import pytest
import torch
from tiny import TINY, batch, shapes, tiny_config

from maskset.boxes import fractions
from maskset.codec_tools.fit import fit_codec
from maskset.errors import ConfigError, MatchingError
from maskset.layers.refinement import RegionAttention
from maskset.losses import squared_dice_loss
from maskset.masks.targets import crop
from maskset.structures import ImageBatch, ModelOutput, SlotPredictions
from maskset.systems import build
from maskset.systems.istr import Istr, IstrConfig


def tiny(prepared: bool = True, **changes) -> Istr:
    torch.manual_seed(0)
    model = build(tiny_config("istr", **changes))
    if prepared:
        model.prepare(objects for _, objects in shapes(16))
    return model


def step(model: Istr, count: int = 3) -> dict[str, torch.Tensor]:
    images, objects = batch(shapes(count), model.config)
    terms = model.loss(model(images), images, objects)
    torch.stack(list(terms.values())).sum().backward()
    return terms


def perfect(model: Istr, images: ImageBatch, objects) -> ModelOutput:
    """Return the output that says exactly what the objects of one image are."""
    logits = torch.full((1, len(objects), model.config.num_classes), -10.0)
    logits[0, torch.arange(len(objects)), objects.labels] = 10.0
    codes = model._encode(crop(objects.masks, objects.boxes, model.codec.size).float())
    return ModelOutput([SlotPredictions(logits, codes[None], fractions(objects.boxes, images.sizes[0].tolist())[None])])


def test_the_loss_of_the_truth_is_nearly_nothing_and_its_results_are_the_objects():
    model = tiny(code_length=30)
    images, objects = batch(shapes(1), model.config)
    output = perfect(model, images, objects[0])
    terms = model.loss(output, images, objects[:1])
    assert set(terms) == {"class", "box_l1", "box_giou", "mask_code", "mask_dice"}
    assert max(terms[name] for name in ("class", "box_l1", "box_giou", "mask_code")) < 1e-3
    (found,) = model.postprocess(output, images, [(64, 80)], limit=len(objects[0]))
    for one, label in zip(found, found.labels, strict=True):
        overlaps = (one.masks.dense() & objects[0].masks.dense()).sum((1, 2)) / (
            one.masks.dense() | objects[0].masks.dense()
        ).sum((1, 2))
        assert overlaps.max() > 0.8
        assert objects[0].labels[overlaps.argmax()] == label


@pytest.mark.parametrize("cost", ["cosine", "l1", "dice", "none"])
def test_every_mask_cost_of_table_1b_trains(cost):
    assert all(term.isfinite() for term in step(tiny(mask_cost=cost)).values())


def test_mask_costs_equal_those_of_a_plain_loop():
    torch.manual_seed(0)
    codes, masks = torch.randn(2, 1, 4, 12), torch.rand(1, 3, 16, 16) > 0.5
    for kind in ("cosine", "l1", "dice"):
        model = tiny(mask_cost=kind)
        found, targets = model._mask_cost(codes, masks.float()), model._encode(masks[0].float())
        for layer, slot, target in [(0, 0, 0), (1, 3, 2), (1, 2, 1)]:
            one, wanted = codes[layer, 0, slot], targets[target]
            expected = {
                "cosine": -(torch.dot(one, wanted) / one.norm() / wanted.norm() + 1) / 2,
                "l1": (one - wanted).abs().mean(),
                "dice": squared_dice_loss(model.codec.decode(one[None]), masks[0, target][None].float(), 1e-5)[0],
            }[kind]
            torch.testing.assert_close(found[layer, 0, slot, target], expected)
    assert not tiny(mask_cost="none")._mask_cost(codes, masks.float()).any()


@pytest.mark.parametrize(
    ("losses", "names"), [("both", {"mask_code", "mask_dice"}), ("code", {"mask_code"}), ("dice", {"mask_dice"})]
)
def test_the_mask_losses_of_table_1c_are_one_or_both(losses, names):
    terms = step(tiny(mask_losses=losses))
    assert {name for name in terms if name.startswith("mask") and "/" not in name} == names


@pytest.mark.parametrize("length", [4, 30])
def test_every_code_length_of_table_1a_trains(length):
    model = tiny(code_length=length)
    assert step(model)["mask_code"].isfinite()
    assert model.stages[0].mask_head[1].weight.grad.any()


def test_raw_masks_of_table_1a_are_their_own_code():
    model = tiny(prepared=False, codec="flatten", code_length=256)
    assert step(model)["mask_dice"].isfinite()
    images, objects = batch(shapes(1), model.config)
    terms = model.loss(perfect(model, images, objects[0]), images, objects[:1])
    assert max(term.item() for term in terms.values()) < 1e-3


def test_multi_head_attention_of_table_1d_takes_the_place_of_the_dynamic_one():
    model = tiny(attention="multi-head")
    assert all(isinstance(stage.encoder.region_attention, RegionAttention) for stage in model.stages)
    assert all(term.isfinite() for term in step(model).values())
    assert model.stages[0].encoder.region_attention.attention.in_proj_weight.grad.any()


@pytest.mark.parametrize(("how", "positions"), [("mean", False), ("max", False), ("max", True), ("none", True)])
def test_every_start_of_table_1e_trains(how, positions):
    model = tiny(image_feature=how, position_embedding=positions)
    assert hasattr(model, "query_position") == positions
    assert all(term.isfinite() for term in step(model).values())
    # Where nothing but the whole image makes an object's feature, all objects start alike
    images, _ = batch(shapes(2), model.config)
    starts = model._object_features(model.pyramid(model.backbone(images.pixels)), images)
    assert torch.equal(starts[:, 0], starts[:, 1]) != positions
    assert torch.equal(starts[0], starts[1]) == (how == "none")


@pytest.mark.parametrize("stages", [1, 3])
def test_a_stage_more_or_less(stages):
    terms = step(tiny(stages=stages))
    assert len(terms) == 5 * stages
    assert "class/0" in terms or stages == 1


def test_padding_may_be_left_out_of_the_image_feature():
    small, large = shapes(1, size=(64, 96))[0], shapes(1, size=(128, 160))[0]
    images, _ = batch([small, large], TINY["istr"])
    levels = [torch.ones(2, 32, 128 // s, 160 // s) for s in (4, 8, 16, 32)]
    for level in levels:
        height, width = (64 * level.shape[2]) // 128, (96 * level.shape[3]) // 160
        level[0, :, height:], level[0, :, :, width:] = 9.0, 9.0
    kept, left = tiny(position_embedding=False), tiny(position_embedding=False, masked_pooling=True)
    assert (kept._object_features(levels, images)[0] > 5 * 4).all()
    torch.testing.assert_close(left._object_features(levels, images), torch.full((2, 12, 32), 4.0))


def test_targets_are_noisy_unless_asked_not_to_be():
    masks = torch.zeros(2, 16, 16)
    noisy, fixed = tiny(target_noise=True), tiny()
    assert not torch.equal(noisy._encode(masks), noisy._encode(masks))
    assert torch.equal(fixed._encode(masks), fixed._encode(masks))


def test_boxes_reach_the_next_stage_without_gradient_and_features_with_it():
    model = tiny()
    images, _ = batch(shapes(1), model.config)
    last = model(images).layers[-1]
    last.boxes.sum().backward(retain_graph=True)
    assert model.stages[0].box_head[1].weight.grad is None
    assert model.query_boxes.grad is None
    last.class_logits.sum().backward()
    assert model.stages[0].encoder.up.weight.grad.any()


def test_boxes_are_not_clipped_in_the_stages_but_in_the_results():
    model = tiny().eval()
    images, objects = batch(shapes(1), model.config)
    output = perfect(model, images, objects[0])
    output.layers[0].boxes[0, 0] = torch.tensor([0.0, 0.5, 1.0, 3.0])  # half of it, and more, is outside
    output.layers[0].boxes[0, 1] = torch.tensor([2.0, 0.5, 0.5, 0.5])  # all of it
    (found,) = model.postprocess(output, images, [(64, 80)], limit=len(objects[0]))
    assert len(found) == len(objects[0]) - 1
    assert [0, 0, 40, 64] in found.boxes.tolist()


def test_boxes_that_are_not_finite_are_named():
    model = tiny()
    images, objects = batch(shapes(1), model.config)
    with torch.no_grad():
        model.stages[0].box_head[1].bias[:] = torch.nan
    with pytest.raises(MatchingError, match=r"layer 0, image 0 .* because boxes is"):
        model.loss(model(images), images, objects)


def test_a_codec_must_be_fitted_or_loaded_before_it_is_used(tmp_path):
    with pytest.raises(ConfigError, match="not been fitted"):
        step(tiny(prepared=False))
    written = fit_codec("logit-pca", "shapes", tmp_path / "code.safetensors", size=16, length=12, max_masks=50, progress=False)
    model = tiny(codec_weights=str(tmp_path / "code.safetensors"))
    assert torch.equal(model.codec.components, written.components)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_dim": 30}, "multiple of num_heads"),
        ({"stages": 0}, "stages must be at least 1"),
        ({"mask_weight": -1.0}, "mask_weight must not be negative"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"code_length": 257}, r"code_length must be 1 \.\.\. 256"),
        ({"codec": "flatten"}, "code_length must be 256"),
        ({"codec": "flatten", "code_length": 256, "codec_weights": "x"}, "is not fitted"),
        ({"image_feature": "none", "position_embedding": False}, "needs model.position_embedding"),
        ({"input": dataclasses.replace(TINY["istr"].input, divisor=16)}, "multiple of 32"),
        ({"backbone": {"norm": "frozen"}}, "pretrained"),
    ],
)
def test_settings_that_contradict_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny(**changes)


def test_the_defaults_are_the_official_ones():
    config = IstrConfig()
    assert (config.hidden_dim, config.num_queries, config.stages, config.code_length, config.mask_size) == (256, 300, 6, 60, 28)
    assert (config.class_weight, config.l1_weight, config.giou_weight, config.mask_weight) == (2, 5, 2, 2)
