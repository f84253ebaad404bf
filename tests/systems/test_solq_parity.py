"""SOLQ against what the official code computes, full size, through the converter; golden/solq.json explains the arrays."""

import functools

import pytest
import torch
from goldens import ellipses, golden, image, notes, unpacked, weights
from on_device import recording

from maskset import boxes as box_ops
from maskset.conversion import convert
from maskset.conversion.class_names import raw_categories
from maskset.conversion.keys import rename
from maskset.conversion.solq import RULES
from maskset.detection import Matches, top_k_detections
from maskset.instances import Instances, Masks
from maskset.masks.paint import binarize
from maskset.masks.targets import crop
from maskset.structures import ImageBatch, ModelOutput, SlotPredictions
from maskset.systems import build

LAYERS = 6
INPUTS = {"a": [("solq-a", 192, 256)], "bc": [("solq-b", 160, 224), ("solq-c", 192, 160)]}
TARGETS = {
    "a": [("solq-targets", [1, 3, 3, 17, 44])],
    "bc": [("solq-targets-b", [1, 3, 3, 17, 44]), ("solq-targets-c", [7, 0, 90])],
}
TERMS = {"class": "loss_ce", "box_l1": "loss_bbox", "box_giou": "loss_giou", "mask_code": "loss_vector"}


@functools.cache
def model():
    """Return the official R50 model, filled by the recipe. Aliases differ in it, so the last one wins, as officially."""
    config, state = convert("solq", weights(notes("solq")["state_dict"]), use_last_copy=True)
    network = build(config, raw_categories()).eval()
    network.load_state_dict(state, strict=True)
    return network


def base(name: str) -> str:
    return name.removesuffix("q")


def batch(name: str) -> ImageBatch:
    return ImageBatch.from_images([image(*entry) for entry in INPUTS[base(name)]])


def objects(name: str, index: int, height: int, width: int) -> Instances:
    key, labels = TARGETS[base(name)][index]
    masks = Masks.from_dense(ellipses(key, height, width, len(labels)))
    return Instances(torch.tensor(labels), masks.boxes(), masks, None, raw_categories())


def all_objects(name: str) -> list[Instances]:
    return [objects(name, i, height, width) for i, (_, height, width) in enumerate(INPUTS[base(name)])]


@functools.cache
def run(name: str):
    """Return output, loss terms and gradients of one set. The sets ending in q have queries of unit variance."""
    network = model()
    changed = {"query_embed.weight": ["query_position", "query_content"], "transformer.level_embed": ["level_embedding"]}
    factors = {ours: notes("solq")["overrides"][theirs] for theirs, names in changed.items() for ours in names}
    parameters = dict(network.named_parameters())
    before = {ours: parameters[ours].detach().clone() for ours in factors}
    if name.endswith("q"):
        for ours, factor in factors.items():
            parameters[ours].data.mul_(torch.tensor(factor))
    seen: dict[str, torch.Tensor] = {}
    watched = {
        "enc0attn": network.encoder.layers[0].attention,
        "enc0": network.encoder.layers[0],
        "enc5": network.encoder.layers[5],
        "dec0ca": network.decoder[0].cross_attention,
        "dec0sa": network.decoder[0].self_attention,
        **{f"proj{i}": norm for i, norm in enumerate(network.project.norms)},
        **{f"hs{i}": layer for i, layer in enumerate(network.decoder)},
    }
    hooks = [
        part.register_forward_hook(lambda _m, _i, out, key=key: seen.__setitem__(key, out[0] if isinstance(out, tuple) else out))
        for key, part in watched.items()
    ]
    images = batch(name)
    output = network(images)
    terms = network.loss(output, images, all_objects(name))
    network.zero_grad()
    torch.stack(list(terms.values())).sum().backward()
    grads = {key: parameter.grad.clone() for key, parameter in parameters.items() if parameter.grad is not None}
    for hook in hooks:
        hook.remove()
    for ours, value in before.items():
        parameters[ours].data.copy_(value)
    network.zero_grad()
    seen = {key: value.detach() for key, value in seen.items()}
    output = ModelOutput(
        [SlotPredictions(p.class_logits.detach(), p.mask_params.detach(), p.boxes.detach()) for p in output.layers]
    )
    return output, {key: value.item() for key, value in terms.items()}, grads, seen


def close(found: torch.Tensor, expected: torch.Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


SETS = ["a", "bc", "aq", "bcq"]
RESULTS = [("a", "same"), ("a", "orig"), ("bc", "same"), ("aq", "same"), ("aq", "orig"), ("bcq", "same")]


def test_the_model_has_the_official_parameters():
    assert sum(p.numel() for p in model().parameters()) == 54_193_660
    assert sum(p.numel() for p in model().parameters() if p.requires_grad) == 53_971_260


@pytest.mark.parametrize("name", SETS)
def test_every_stage_is_the_official_one(name):
    output, _, _, seen = run(name)
    for key in ("enc0attn", "enc0", "enc5"):
        close(seen[key].mean(), golden("solq", f"{name}.{key}.mean"))
        close(seen[key].std(correction=0), golden("solq", f"{name}.{key}.std"))
        close(seen[key][:, ::37, :16], golden("solq", f"{name}.{key}.slice"))
    for key in ("dec0sa", "dec0ca"):
        close(seen[key][:, ::30, :16], golden("solq", f"{name}.{key}.slice"))
        close(seen[key].std(correction=0), golden("solq", f"{name}.{key}.std"))
    hidden = torch.stack([seen[f"hs{i}"] for i in range(LAYERS)])
    close(hidden[:, :, ::30, :16], golden("solq", f"{name}.hs.slice"))
    close(torch.stack([p.boxes for p in output.layers]), golden("solq", f"{name}.inter_references"))
    for i in range(4):
        arrays = notes("solq")["arrays"]
        if f"{name}.proj{i}.slice" in arrays:
            close(seen[f"proj{i}"][:, :8, :4, :4], golden("solq", f"{name}.proj{i}.slice"))
            close(seen[f"proj{i}"].mean((2, 3)), golden("solq", f"{name}.proj{i}.chmean"))


@pytest.mark.parametrize("name", SETS)
def test_predictions_are_the_official_ones(name):
    output = run(name)[0]
    last = output.layers[-1]
    close(last.class_logits, golden("solq", f"{name}.pred_logits"))
    close(last.boxes, golden("solq", f"{name}.pred_boxes"))
    close(last.mask_params, golden("solq", f"{name}.pred_vectors"))
    for i, layer in enumerate(output.layers[:-1]):
        if f"{name}.aux{i}.logits.slice" not in notes("solq")["arrays"]:
            continue
        close(layer.class_logits[:, ::30], golden("solq", f"{name}.aux{i}.logits.slice"))
        close(layer.boxes[:, ::30], golden("solq", f"{name}.aux{i}.boxes.slice"))
        close(layer.mask_params[:, ::30, :32], golden("solq", f"{name}.aux{i}.vectors.slice"))


@pytest.mark.parametrize("name", SETS)
def test_loss_terms_are_the_official_ones(name):
    terms = run(name)[1]
    weight = notes("solq")["weight_dict"]
    assert len(terms) == 4 * LAYERS
    for key, value in terms.items():
        term, _, layer = key.partition("/")
        official = TERMS[term] + (f"_{layer}" if layer else "")
        assert value == pytest.approx(weight[official] * golden("solq", f"{name}.loss.{official}").item(), rel=1e-5), key
    assert sum(terms.values()) == pytest.approx(golden("solq", f"{name}.loss.total").item(), rel=1e-5)


@pytest.mark.parametrize("name", SETS)
def test_gradients_are_the_official_ones(name):
    grads = run(name)[2]
    names = notes("solq")["grad_params"]
    ours = {n: next(iter(rename({n: torch.zeros(0)}, RULES))) for n in names}
    grads = grads | {"query": torch.cat([grads["query_position"], grads["query_content"]], 1)}
    expected = golden("solq", f"{name}.grad.norms")
    for official, norm in zip(names, expected.tolist(), strict=True):
        assert grads[ours[official]].norm().item() == pytest.approx(norm, rel=2e-3, abs=1e-7), official
    total = torch.stack([g.norm() for key, g in grads.items() if key != "query"]).norm()
    assert total.item() == pytest.approx(golden("solq", f"{name}.grad.global_norm").item(), rel=1e-3)


def matches_of(output: ModelOutput, images: ImageBatch, targets: list[Instances], monkeypatch) -> Matches:
    """Return what the loss matches."""
    kept: list[Matches] = []

    monkeypatch.setattr("maskset.detection.match", recording(kept))
    model().loss(output, images, targets)
    return kept[0]


@pytest.mark.parametrize("name", SETS)
def test_matches_are_the_official_ones(name, monkeypatch):
    found = matches_of(run(name)[0], batch(name), all_objects(name), monkeypatch)
    for layer in range(LAYERS):
        for i in range(len(INPUTS[base(name)])):
            expected = golden("solq", f"{name}.match.{'final' if layer == LAYERS - 1 else f'aux{layer}'}.{i}")
            chosen = (found.layer == layer) & (found.image == i)
            assert torch.equal(torch.stack([found.slot[chosen], found.object[chosen]]), expected)


@pytest.mark.parametrize("name", SETS)
def test_targets_are_the_official_ones(name):
    for i, found in enumerate(all_objects(name)):
        close(found.boxes, golden("solq", f"{name}.target{i}.xyxy"), 0)
        assert torch.equal(crop(found.masks, found.boxes, 128), unpacked("solq", f"{name}.target{i}.crop_packed", 128))
        close(model()._target_codes([found], torch.device("cpu")), golden("solq", f"{name}.target{i}.vectors"))


def iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    union = (a | b).sum((1, 2))
    return torch.where(union > 0, (a & b).sum((1, 2)) / union.clamp(min=1), 1.0)


@pytest.mark.parametrize(
    ("name", "kind"), [("a", "same"), ("a", "orig"), ("bc", "same"), ("aq", "same"), ("aq", "orig"), ("bcq", "same")]
)
def test_results_are_the_official_ones(name, kind):
    sizes = [tuple(size) for size in golden("solq", f"{name}.post.{kind}.target_sizes").tolist()]
    output = run(name)[0]
    if not name.endswith("q"):  # all queries nearly coincide: only the stored logits have the stored order
        output = ModelOutput(
            [SlotPredictions(*(golden("solq", f"{name}.{p}") for p in ("pred_logits", "pred_vectors", "pred_boxes")))]
        )
    for i, (found, size) in enumerate(zip(model().postprocess(output, batch(name), sizes), sizes, strict=True)):
        key = f"{name}.post.{kind}.{i}"
        scores = golden("solq", f"{key}.scores")
        close(found.scores, scores, 1e-5)
        # Slots are not in the results: in order but for exact ties, so compare as sets where neighbors tie
        clear = ((scores[:-1] - scores[1:]).abs() > 1e-6).tolist()
        alone = torch.tensor([(j == 0 or clear[j - 1]) and (j == 99 or clear[j]) for j in range(100)])
        assert alone.sum() > (90 if name.endswith("q") else 0)
        assert torch.equal(found.labels[alone], golden("solq", f"{key}.labels")[alone])
        # The official boxes go beyond the image: compared before they are clipped, then clipped.
        last, official = output.layers[-1], golden("solq", f"{key}.boxes")
        slots = top_k_detections(last.class_logits[i], 100, 0.0)[0]
        boxes = (box_ops.to_corners(last.boxes[i]) * box_ops.scale_of(size, last.boxes))[slots].detach()
        close(boxes[alone], official[alone], 0.05)
        close(boxes.sum(0) / 100, official.sum(0) / 100, 0.05)
        close(found.boxes[alone], box_ops.clip(official, size)[alone], 0.05)
        assert sorted(found.labels.tolist()) == sorted(golden("solq", f"{key}.labels").tolist())
        close(found.boxes.sum(0) / 100, box_ops.clip(official, size).sum(0) / 100, 0.05)
        expected = unpacked("solq", f"{key}.masks_packed", size[1])
        assert (iou(found.masks[:10].dense(), expected)[alone[:10]] > 0.999).all()
        areas = golden("solq", f"{key}.mask_area")[alone]
        assert (found.masks.areas()[alone] - areas).abs().max() <= 5  # the official decoder works in float64


@pytest.mark.parametrize("name", ["aq", "bcq"])
def test_local_masks_are_the_official_ones(name):
    output = run(name)[0]
    for i, vectors in enumerate(output.layers[-1].mask_params):
        queries = golden("solq", f"{name}.post.queries")[i, :10]
        fields = model().codec.decode(vectors[queries])
        assert (iou(binarize(fields), unpacked("solq", f"{name}.post.local_packed", 128)[i]) > 0.999).all()
        close(fields[0, ::4, ::4], golden("solq", f"{name}.post.local0.soft")[i])


def unit() -> tuple[ModelOutput, ImageBatch, list[Instances]]:
    """Return the synthetic predictions, and targets of the two images, without a network."""
    tensors = [golden("solq", f"unit.{key}").clone().requires_grad_() for key in ("logits", "vectors", "boxes")]
    images = ImageBatch.from_images([torch.zeros(3, 160, 208), torch.zeros(3, 160, 160)])
    targets = []
    for key, size, labels in (("solq-unit", (160, 208), [1, 3, 3, 17, 44]), ("solq-unit-2", (160, 160), [61, 5])):
        masks = Masks.from_dense(ellipses(key, *size, len(labels)))
        targets.append(Instances(torch.tensor(labels), masks.boxes(), masks, None, raw_categories()))
    return ModelOutput([SlotPredictions(*tensors)]), images, targets


@pytest.mark.parametrize("case", ["both", "one_empty", "all_empty"])
def test_the_criterion_is_the_official_one(case, monkeypatch):
    output, images, targets = unit()
    emptied = {"both": [], "one_empty": [1], "all_empty": [0, 1]}[case]
    targets = [found[[]] if i in emptied else found for i, found in enumerate(targets)]
    terms = model().loss(output, images, targets)
    weight = notes("solq")["weight_dict"]
    for ours, official in TERMS.items():
        expected = weight[official] * golden("solq", f"unit.{case}.{official}").item()
        assert terms[ours].item() == pytest.approx(expected, rel=1e-5, abs=1e-7)
    torch.stack(list(terms.values())).sum().backward()
    last = output.layers[0]
    close(last.class_logits.grad, golden("solq", f"unit.{case}.grad.pred_logits"), 1e-5)
    close(last.boxes.grad, golden("solq", f"unit.{case}.grad.pred_boxes"), 1e-5)
    close(last.mask_params.grad[:, :, :16], golden("solq", f"unit.{case}.grad.pred_vectors"), 1e-5)
    found = matches_of(output, images, targets, monkeypatch)
    for i in range(2):
        expected = golden("solq", f"unit.{case}.match.{i}")
        assert torch.equal(torch.stack([found.slot[found.image == i], found.object[found.image == i]]), expected)


def test_the_post_processor_is_the_official_one():
    output, images, _ = unit()
    sizes = [tuple(size) for size in golden("solq", "unit.post.sizes").tolist()]
    for i, (found, size) in enumerate(zip(model().postprocess(output, images, sizes), sizes, strict=True)):
        close(found.scores, golden("solq", f"unit.post.{i}.scores"), 1e-6)
        assert torch.equal(found.labels, golden("solq", f"unit.post.{i}.labels"))
        official, corner = golden("solq", f"unit.post.{i}.boxes"), torch.tensor([size[1], size[0]] * 2)
        close(found.boxes, official.clamp(min=0).minimum(corner), 1e-3)  # the official boxes go beyond the image
        assert torch.equal(found.masks.areas(), golden("solq", f"unit.post.{i}.mask_area"))
        assert torch.equal(found.masks[:16].dense(), unpacked("solq", f"unit.post.{i}.masks_packed", size[1]))
