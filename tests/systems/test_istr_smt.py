"""What ISTR-SMT has beside its published configuration: the other codes, and where this code is safer."""

import dataclasses

import pytest
import torch
from tiny import TINY, batch, shapes, tiny_config

from maskset.boxes import fractions
from maskset.codec_tools.fit import fit_codec
from maskset.detection import Matches
from maskset.errors import ConfigError, MatchingError
from maskset.masks.targets import crop
from maskset.structures import ModelOutput, SlotPredictions
from maskset.systems import build
from maskset.systems.istr_smt import IstrSmt, IstrSmtConfig


def tiny(prepared: bool = True, **changes) -> IstrSmt:
    torch.manual_seed(0)
    model = build(tiny_config("istr-smt", **changes))
    if prepared:
        model.prepare(objects for _, objects in shapes(16))
    return model.train()


def step(model: IstrSmt, count: int = 3) -> dict[str, torch.Tensor]:
    images, objects = batch(shapes(count), model.config)
    terms = model.loss(model(images), images, objects)
    torch.stack(list(terms.values())).sum().backward()
    return terms


def perfect(model: IstrSmt, images, objects) -> ModelOutput:
    """Return the output of one stage that says exactly what the objects of one image are."""
    logits = torch.full((1, len(objects), model.config.num_classes), -10.0)
    logits[0, torch.arange(len(objects)), objects.labels] = 10.0
    codes = model._encode(crop(objects.masks, objects.boxes, model.codec.size))
    return ModelOutput([SlotPredictions(logits, codes[None], fractions(objects.boxes, images.sizes[0].tolist())[None])])


@pytest.mark.parametrize(("codec", "length"), [("autoencoder", 12), ("dct", 100), ("logit-pca", 20)])
def test_every_code_trains_and_only_the_autoencoder_has_context(codec, length):
    model = tiny(codec=codec, code_length=length)
    terms = step(model)
    assert len(terms) == 10
    assert all(term.isfinite() for term in terms.values())
    assert model.stages[0].mask_head[6].weight.grad.any()
    images, _ = batch(shapes(1), model.config)
    layers = model(images).layers
    assert all((layer.mask_context is not None) == (codec == "autoencoder") for layer in layers)
    assert layers[0].mask_params.shape == (1, 12, length)


@pytest.mark.parametrize(("codec", "length"), [("dct", 200), ("logit-pca", 30)])
def test_the_loss_of_the_truth_is_nearly_nothing_and_its_results_are_the_objects(codec, length):
    model = tiny(codec=codec, code_length=length, target_noise=False, averaged_stages=1)
    images, objects = batch(shapes(1), model.config)
    output = perfect(model, images, objects[0])
    terms = model.loss(output, images, objects[:1])
    assert max(terms[name] for name in ("class", "box_l1", "box_giou", "mask_code")) < 1e-3
    (found,) = model.postprocess(output, images, [(64, 80)], limit=len(objects[0]))
    truth = objects[0].masks.dense()
    for one in found:
        drawn = one.masks.dense()
        assert ((drawn & truth).sum((1, 2)) / (drawn | truth).sum((1, 2))).max() > 0.8


def test_masks_are_compared_inside_the_predicted_boxes_cut_to_the_image():
    model = tiny(codec="dct", code_length=200, averaged_stages=1)
    images, objects = batch(shapes(1), model.config)
    output, one = perfect(model, images, objects[0]), objects[0][:1]
    wide = one.boxes + torch.tensor([[-200.0, -3, 5, 4]])
    boxes = output.layers[0].boxes.clone()
    boxes[0, 0] = fractions(wide, (64, 80))[0]
    layer = dataclasses.replace(output.layers[0], boxes=boxes)
    pairs = Matches(*torch.zeros(4, 1, dtype=torch.int64), [1])  # the first slot and the first object
    cut = torch.minimum(wide.clamp(min=0), torch.tensor([80.0, 64, 80, 64]))
    found = model._masks_in_predicted_boxes([layer], pairs, [one])
    assert torch.equal(found, crop(one.masks, cut, 32))


def test_the_loss_of_a_model_in_evaluation_mode_says_what_to_do():
    model = tiny().eval()
    images, objects = batch(shapes(1), model.config)
    with pytest.raises(ValueError, match=r"only gives in training mode: model\.train\(\)"):
        model.loss(model(images), images, objects)


def test_scores_are_means_over_the_last_stages():
    model = tiny(averaged_stages=1).eval()
    images, _ = batch(shapes(1), model.config)
    with torch.no_grad():
        output = model(images)
    output.layers[0].class_logits += 5.0
    last = model.postprocess(output, images, [(64, 80)])[0].scores
    object.__setattr__(model, "config", dataclasses.replace(model.config, averaged_stages=2))
    mean = model.postprocess(output, images, [(64, 80)])[0].scores
    assert mean.max() > last.max()


def test_the_decoder_is_trained_on_and_the_encoder_is_not():
    model = tiny()
    before = model.codec.encoder[1].running_mean.clone()
    step(model)
    assert model.codec.last.weight.grad.any()
    assert all(parameter.grad is None for parameter in model.codec.encoder.parameters())
    assert not torch.equal(model.codec.encoder[1].running_mean, before)  # its statistics drift, as officially


def test_boxes_that_are_not_finite_are_named():
    model = tiny()
    images, objects = batch(shapes(1), model.config)
    with torch.no_grad():
        model.stages[0].box_head[1].bias[:] = torch.inf
    with pytest.raises(MatchingError, match=r"layer 0, image 0 .* because boxes"):
        model.loss(model(images), images, objects)


def test_a_code_from_a_file_is_taken_as_it_is(tmp_path):
    path = tmp_path / "code.safetensors"
    written = fit_codec("logit-pca", "shapes", path, size=32, length=12, max_masks=50, progress=False)
    model = tiny(codec="logit-pca", codec_weights=str(path))
    assert torch.equal(model.codec.means, written.means)
    with pytest.raises(ConfigError, match="not been fitted"):
        step(tiny(prepared=False))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_dim": 30}, "multiple of num_heads"),
        ({"autoencoder_steps": 0}, "autoencoder_steps must be at least 1"),
        ({"dice_weight": -1.0}, "dice_weight must not be negative"),
        ({"dropout": -0.1}, "dropout must be in"),
        ({"averaged_stages": 3}, r"averaged_stages must be in \[1, 2\], got 3"),
        ({"mask_size": 28}, "mask_size must be a multiple of 16 from 32 to 1024"),
        ({"code_length": 1025}, r"code_length must be 1 \.\.\. 1024"),
        ({"codec": "dct", "codec_weights": "x"}, "dct is not fitted"),
        ({"input": dataclasses.replace(TINY["istr-smt"].input, divisor=16)}, "multiple of 32"),
    ],
)
def test_settings_that_contradict_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny(**changes)


def test_the_defaults_are_the_official_ones():
    config = IstrSmtConfig()
    assert (config.hidden_dim, config.num_queries, config.stages, config.code_length, config.mask_size) == (256, 300, 6, 256, 112)
    assert (config.class_weight, config.l1_weight, config.giou_weight, config.code_weight, config.dice_weight) == (2, 5, 2, 1, 5)
