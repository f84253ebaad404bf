"""What SOIT has beside its published configuration: other mask transformers, fewer mask losses, batches of any padding."""

import pytest
import torch
from tiny import TINY, batch, shapes, tiny_config

from maskset.errors import ConfigError
from maskset.structures import ImageBatch, ModelOutput, SlotPredictions
from maskset.systems import build
from maskset.systems.soit import Soit, SoitConfig


def tiny(**changes) -> Soit:
    torch.manual_seed(0)
    return build(tiny_config("soit", **changes))


def step(model: Soit, count: int = 3) -> dict[str, torch.Tensor]:
    images, objects = batch(shapes(count), model.config)
    terms = model.loss(model(images), images, objects)
    torch.stack(list(terms.values())).sum().backward()
    return terms


@pytest.mark.parametrize(
    ("changes", "numbers"),
    [
        ({"mask_heads": 8}, 873),
        ({"mask_heads": 1}, 117),
        ({"mask_channels": 4, "mask_heads": 2, "mask_points": 1}, 35),
        ({"mask_channels": 16}, 833),
    ],
)
def test_every_mask_transformer_of_the_ablations_trains(changes, numbers):
    model = tiny(**changes)
    assert model.mask_head.last.out_features == numbers
    terms = step(model)
    assert all(term.isfinite() for term in terms.values())
    assert model.mask_head.last.weight.grad.any()


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_the_mask_encoder_has_any_number_of_layers(layers):
    model = tiny(mask_encoder_layers=layers)
    step(model)
    assert len(model.mask_encoder.layers) == layers
    assert model.mask_projection.weight.grad.any()


def test_positions_change_the_masks_only():
    images, objects = batch(shapes(2), TINY["soit"])
    terms = {}
    for positions in ("relative", "absolute", "none"):
        model = tiny(mask_positions=positions)
        terms[positions] = {name: value.item() for name, value in model.loss(model(images), images, objects).items()}
    assert len({values["mask_dice"] for values in terms.values()}) == 3
    assert len({values["class"] for values in terms.values()}) == 1


@pytest.mark.parametrize(("layers", "names"), [(1, {"mask_dice"}), (2, {"mask_dice", "mask_dice/0"})])
def test_only_the_last_layers_have_mask_losses(layers, names):
    terms = step(tiny(mask_loss_layers=layers))
    assert {name for name in terms if name.startswith("mask_dice")} == names
    assert {name.replace("dice", "bce") for name in names} < set(terms)
    assert {"class", "class/0", "class/proposals", "box_giou/proposals"} < set(terms)


def test_the_weights_of_the_mask_losses_multiply_them():
    base, changed = step(tiny()), step(tiny(dice_weight=16.0, bce_weight=1.0))
    assert changed["mask_dice"].item() == pytest.approx(2 * base["mask_dice"].item(), rel=1e-5)
    assert changed["mask_bce"].item() == pytest.approx(base["mask_bce"].item() / 2, rel=1e-5)


def test_many_objects_are_drawn_in_pieces_with_the_same_loss_and_gradients(monkeypatch):
    whole = tiny()
    expected = step(whole)
    monkeypatch.setattr("maskset.systems.soit._MAX_SAMPLES", 1)  # one object at a time
    pieces = tiny()
    found = step(pieces)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)
    for (name, one), other in zip(whole.named_parameters(), pieces.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-3, msg=name)


def test_padding_changes_no_mask():
    """The masks of an image on a larger canvas, from the same features, are those on its own canvas."""
    model = tiny().eval()
    torch.manual_seed(1)
    own, larger = torch.randn(1, 8, 6, 7), torch.randn(1, 8, 9, 10)
    larger[:, :, :6, :7] = own
    slots = SlotPredictions(torch.randn(1, 5, 3), torch.randn(1, 5, 441), torch.rand(1, 5, 4))
    sizes = torch.tensor([[48, 56]])
    (alone,) = model.postprocess(ModelOutput([slots], own), ImageBatch(torch.zeros(1, 3, 48, 56), sizes), [(96, 112)])
    (padded,) = model.postprocess(ModelOutput([slots], larger), ImageBatch(torch.zeros(1, 3, 72, 80), sizes), [(96, 112)])
    assert alone.masks.areas().any()
    assert alone.masks == padded.masks


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_queries": 0}, "model.num_queries must be at least 1, got 0"),
        ({"mask_encoder_layers": -1}, "model.mask_encoder_layers must not be negative, got -1"),
        ({"dropout": 1.0}, "model.dropout must be in"),
        ({"hidden_dim": 30}, r"model.hidden_dim must be a multiple of 4 and of num_heads \(8\), got 30"),
        ({"mask_channels": 6, "mask_heads": 2}, r"model.mask_channels must be a multiple of 4 and of mask_heads \(2\), got 6"),
        ({"mask_channels": 8, "mask_heads": 3}, r"model.mask_channels must be a multiple of 4 and of mask_heads \(3\), got 8"),
        ({"mask_loss_layers": 7}, r"model.mask_loss_layers must be in \[1, 6\], got 7"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        SoitConfig(**changes)
