"""What SOLQ has beside its published configuration: other codes, two stages, no box refinement, fewer layers with mask loss."""

from dataclasses import replace

import pytest
import torch
from tiny import TINY, batch, shapes, tiny_config

from maskset.codec_tools.fit import fit_codec
from maskset.errors import ConfigError
from maskset.instances import Category
from maskset.structures import ModelOutput, SlotPredictions
from maskset.systems import build
from maskset.systems.solq import Solq, SolqConfig


def tiny(**changes) -> Solq:
    torch.manual_seed(0)
    return build(tiny_config("solq", **changes))


def step(model: Solq, count: int = 4) -> dict[str, torch.Tensor]:
    images, objects = batch(shapes(count), model.config)
    terms = model.loss(model(images), images, objects)
    torch.stack(list(terms.values())).sum().backward()
    return terms


@pytest.mark.parametrize(("codec", "size", "length"), [("dct", 32, 40), ("flatten", 12, 144), ("pca", 16, 8), ("sparse", 12, 10)])
def test_every_code_trains_and_decodes(codec, size, length):
    model = tiny(codec=codec, mask_size=size, code_length=length)
    model.prepare(objects for _, objects in shapes(8))
    assert torch.isfinite(step(model)["mask_code"])
    assert model.mask_head.last.weight.grad.any()
    images, objects = batch(shapes(1), model.config)
    fed = perfect(model, images, objects[0])
    (found,) = model.postprocess(fed, images, [(64, 80)], limit=len(objects[0]))
    assert len(found) == len(objects[0])
    overlap = (found.masks.dense().any(0) & objects[0].masks.dense().any(0)).sum()
    union = (found.masks.dense().any(0) | objects[0].masks.dense().any(0)).sum()
    assert overlap / union > (0.6 if codec in ("pca", "sparse") else 0.85)


def perfect(model: Solq, images, objects) -> ModelOutput:
    """Return the output that says exactly what the objects of one image are."""
    logits = torch.full((1, len(objects), model.config.num_classes), -10.0)
    logits[0, torch.arange(len(objects)), objects.labels] = 10.0
    height, width = images.sizes[0].tolist()
    corners = objects.boxes / torch.tensor([width, height, width, height])
    boxes = torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1)
    return ModelOutput([SlotPredictions(logits, model._target_codes([objects], torch.device("cpu"))[None], boxes[None])])


def test_the_loss_of_the_truth_is_nearly_nothing():
    model = tiny()
    images, objects = batch(shapes(1), model.config)
    output = perfect(model, images, objects[0])
    terms = model.loss(output, images, objects[:1])
    assert set(terms) == {"class", "box_l1", "box_giou", "mask_code"}
    assert all(term < 1e-3 for term in terms.values())


def test_a_codec_must_be_fitted_before_it_is_used():
    with pytest.raises(ConfigError, match="not been fitted"):
        step(tiny(codec="pca", mask_size=16, code_length=8))


def test_a_code_from_a_file_is_taken_as_it_is(tmp_path):
    fit_codec("pca", "shapes", tmp_path / "code.safetensors", size=16, length=8, max_masks=50)
    model = tiny(codec="pca", mask_size=16, code_length=8, codec_weights=str(tmp_path / "code.safetensors"))
    model.prepare(iter(()))
    assert torch.isfinite(step(model)["mask_code"])
    with pytest.raises(ConfigError, match="is not fitted"):
        tiny(codec_weights="code.safetensors")


@pytest.mark.parametrize(("layers", "names"), [(1, {"mask_code"}), (2, {"mask_code", "mask_code/0"})])
def test_only_the_last_layers_have_the_vector_loss(layers, names):
    terms = step(tiny(mask_loss_layers=layers))
    assert {name for name in terms if name.startswith("mask_code")} == names
    assert {"class", "class/0", "box_l1/0", "box_giou/0"} < set(terms)


def test_the_weight_of_the_vector_loss_multiplies_it():
    base, doubled = step(tiny()), step(tiny(mask_weight=2 * TINY["solq"].mask_weight))
    assert doubled["mask_code"].item() == pytest.approx(2 * base["mask_code"].item(), rel=1e-5)
    assert doubled["class"].item() == pytest.approx(base["class"].item(), rel=1e-5)


def test_without_refinement_all_layers_share_heads_and_references():
    model = tiny(box_refinement=False)
    assert len(model.box_heads) == len(model.class_heads) == 1
    terms = step(model)
    assert len(terms) == 8
    assert model.reference_points.weight.grad.any()


@pytest.mark.parametrize("width", [32, 48])
def test_two_stages_work_at_any_width(width):
    model = tiny(two_stage=True, hidden_dim=width)
    terms = step(model)
    assert {"class/proposals", "box_l1/proposals", "box_giou/proposals"} < set(terms)
    assert "mask_code/proposals" not in terms
    images, _ = batch(shapes(2), model.config)
    output = model(images)
    assert output.proposals is not None
    cells = sum(-(-64 // s) * -(-80 // s) for s in (8, 16, 32, 64))
    assert output.proposals.class_logits.shape == (2, cells, 3)
    assert output.layers[-1].boxes.shape == (2, 12, 4)
    silent = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not silent


def test_boxes_that_start_from_points_start_small_and_those_from_proposals_at_their_size():
    points, proposals = tiny(), tiny(two_stage=True)
    assert [head.last.bias.tolist() for head in points.box_heads] == [[0, 0, -2, -2], [0, 0, 0, 0]]
    assert not any(head.last.bias.any() for head in proposals.box_heads)


def test_two_stages_never_propose_padding():
    model = tiny(two_stage=True).eval()
    small, large = shapes(1)[0], shapes(1, size=(64, 160))[0]
    images, _ = batch([small, large], model.config)
    with torch.no_grad():
        together = model(images).proposals
    assert together is not None
    full = (together.boxes[0] == 1).all(-1)  # an anchor of infinity
    assert full.sum() > (together.boxes[1] == 1).all(-1).sum()
    assert together.boxes.isfinite().all()


def test_fewer_cells_than_queries_gives_fewer_slots():
    model = tiny(two_stage=True, num_queries=500)
    images, objects = batch(shapes(1), model.config)
    output = model(images)
    assert output.layers[-1].class_logits.shape[1] < 500
    assert torch.isfinite(model.loss(output, images, objects)["class"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_dim": 30}, "multiple of 4"),
        ({"hidden_dim": 36, "num_heads": 8}, "num_heads"),
        ({"num_queries": 0}, "num_queries must be at least 1"),
        ({"mask_loss_layers": 9}, "mask_loss_layers must be in .1"),
        ({"mask_loss_layers": 0}, "mask_loss_layers must be in .1"),
        ({"code_length": 5000}, "code_length must be 1"),
        ({"codec": "flatten"}, "code_length must be 1024"),
        ({"two_stage": True, "box_refinement": False}, "two_stage needs"),
        ({"backbone": {"norm": "frozen"}}, "pretrained"),
        ({"backbone": {"name": "resnet51"}}, "resnet51"),
    ],
)
def test_settings_that_contradict_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny(**changes)


def test_as_many_categories_as_classes_are_needed():
    with pytest.raises(ConfigError, match="num_classes is 3, but 1 categories"):
        build(TINY["solq"], [Category("cat", 1)])


def test_the_defaults_are_the_official_ones():
    config = SolqConfig()
    assert (config.hidden_dim, config.num_queries, config.code_length, config.mask_size) == (384, 300, 256, 128)
    assert (config.mask_weight, config.class_weight, config.l1_weight, config.giou_weight) == (3, 2, 5, 2)


def test_predicted_boxes_lie_inside_the_image():
    model = tiny().eval()
    images, _ = batch(shapes(1), model.config)
    with torch.no_grad():
        output = model(images)
        boxes = torch.tensor([0.0, 1.0, 0.5, 0.5]).expand_as(output.layers[-1].boxes)  # half of it beyond two sides
        output.layers[-1] = replace(output.layers[-1], boxes=boxes)
        (detections,) = model.postprocess(output, images, [(64, 80)])
    assert torch.equal(detections.boxes, torch.tensor([0.0, 48.0, 20.0, 64.0]).expand_as(detections.boxes))
