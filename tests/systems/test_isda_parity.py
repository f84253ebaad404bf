"""ISDA against what the official code computes, full size, through the converter; golden/isda.json explains the arrays."""

import functools

import pytest
import torch
from goldens import ellipses, golden, image, notes, unpacked, weights
from on_device import recording

from maskset import detection
from maskset.conversion import convert
from maskset.conversion.class_names import used_categories
from maskset.conversion.isda import RULES
from maskset.conversion.keys import rename
from maskset.detection import Matches, focal_cost
from maskset.instances import Instances, Masks
from maskset.layers.blocks import sine_positions
from maskset.masks.heads.features import dynamic_conv
from maskset.masks.paint import paint_probabilities
from maskset.masks.targets import downsample_by_stride
from maskset.structures import ImageBatch, ModelOutput, SlotPredictions
from maskset.systems import build
from maskset.systems.isda import _candidates, _mask_cost

LAYERS = 6
INPUTS = {
    "a": [("isda-a", 192, 256)],
    "bc": [("isda-b", 160, 224), ("isda-c", 192, 160)],
    "d": [("isda-d", 180, 250)],
}
TARGETS = {
    "a": [("isda-targets", [1, 3, 3, 17, 44])],
    "bc": [("isda-targets-b", [1, 3, 3, 17, 44]), ("isda-targets-c", [0, 7, 79])],
}
IMAGES = {"a": ["a"], "bc": ["bc_0", "bc_1"], "d": ["d"]}  # what the arrays of each image begin with
LEVELS = ["P3", "P4", "P5", "P6"]


@functools.cache
def model():
    """Return the official model, filled by the recipe. Aliases differ in it, so the last one wins, as officially."""
    config, state = convert("isda", weights(notes("isda")["state_dict"]), use_last_copy=True)
    network = build(config, used_categories()).eval()
    network.load_state_dict(state, strict=True)
    return network


def batch(name: str) -> ImageBatch:
    return ImageBatch.from_images([image(*entry) for entry in INPUTS[name]], divisor=32)


def objects(name: str) -> list[Instances]:
    found = []
    for (_, height, width), (key, labels) in zip(INPUTS[name], TARGETS[name], strict=True):
        masks = Masks.from_dense(ellipses(key, height, width, len(labels)))
        found.append(Instances(torch.tensor(labels), masks.boxes(), masks, None, used_categories()))
    return found


@functools.cache
def run(name: str):
    """Return output, loss terms, gradients, and what the parts gave, of one set."""
    network = model()
    seen: dict[str, torch.Tensor] = {}
    watched = {
        "P2": network.project_finest.norms[0],
        **{level: network.project.norms[i] for i, level in enumerate(LEVELS)},
        "memory": network.encoder.layers[-1],
        "references": network.reference_points,
        **{f"hs{i}": layer for i, layer in enumerate(network.decoder)},
    }
    hooks = [
        part.register_forward_hook(lambda _m, _i, out, key=key: seen.__setitem__(key, out.detach()))
        for key, part in watched.items()
    ]
    hooks.append(
        network.backbone.register_forward_hook(lambda _m, _i, out: seen.update({f"C{i + 2}": x for i, x in enumerate(out)}))
    )
    images = batch(name)
    output = network(images)
    terms, grads = {}, {}
    if name in TARGETS:
        terms = network.loss(output, images, objects(name))
        network.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        grads = {key: p.grad.clone() for key, p in network.named_parameters() if p.grad is not None}
        network.zero_grad()
    for hook in hooks:
        hook.remove()
    assert output.mask_features is not None
    layers = [SlotPredictions(layer.class_logits.detach(), layer.mask_params.detach()) for layer in output.layers]
    output = ModelOutput(layers, mask_features=output.mask_features.detach())
    return output, {key: value.item() for key, value in terms.items()}, grads, seen


def close(found: torch.Tensor, expected: torch.Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def test_the_model_has_the_official_parameters():
    norms = sum(buffer.numel() for name, buffer in model().named_buffers() if name.endswith((".weight", ".bias")))
    assert sum(p.numel() for p in model().parameters()) + norms == 41_908_624  # there, frozen norms are parameters
    assert sum(p.numel() for p in model().parameters() if p.requires_grad) == 41_633_104


@pytest.mark.parametrize("name", ["a", "bc"])
def test_every_stage_is_the_official_one(name):
    output, _, _, seen = run(name)
    close(batch(name).pixels[:, :, :4, :4], golden("isda", f"{name}_input_slice"), 1e-5)
    for key in ("C2", "C3", "C4", "C5", "P2", *LEVELS):
        close(torch.stack([seen[key].mean(), seen[key].std()]), golden("isda", f"{name}_{key}_stats"))
        close(seen[key][:, :8, :4, :4], golden("isda", f"{name}_{key}_slice"))
    close(torch.stack([seen["memory"].mean(), seen["memory"].std()]), golden("isda", f"{name}_memory_stats"))
    close(seen["memory"][:, ::37, :32], golden("isda", f"{name}_memory_slice"))
    close(seen["references"].sigmoid(), golden("isda", f"{name}_reference_points"), 1e-6)
    hidden = torch.stack([seen[f"hs{i}"] for i in range(LAYERS)])
    close(hidden[:, :, :10, :32], golden("isda", f"{name}_hs_slice"))
    if name == "a":
        close(hidden[-1], golden("isda", "a_hs_last"))
    else:
        close(hidden[-1, :, :100, ::4], golden("isda", "bc_hs_last_q100"))
    features = output.mask_features
    close(torch.stack([features.mean(), features.std()]), golden("isda", f"{name}_mask_feature_stats"))
    close(features[:, [0, 1, 2, 3, 252, 253, 254, 255]], golden("isda", f"{name}_mask_feature_ch"))


@pytest.mark.parametrize("name", ["a", "bc"])
def test_positions_are_the_official_ones(name):
    images, seen = batch(name), run(name)[3]
    for level in LEVELS:
        height, width = seen[level].shape[2:]
        found = sine_positions(images.padding((height, width)), 256).transpose(1, 2).unflatten(2, (height, width))[:, ::16]
        close(found[:, :, :4, :4], golden("isda", f"{name}_posenc_{level}_slice"), 1e-5)
        close(found[:, :, -1, -1], golden("isda", f"{name}_posenc_{level}_last"), 1e-5)


@pytest.mark.parametrize("name", ["a", "bc"])
def test_logits_kernels_and_masks_are_the_official_ones(name):
    output = run(name)[0]
    last, features = output.layers[-1], output.mask_features
    close(last.class_logits, golden("isda", f"{name}_logits"))
    if name == "a":
        close(last.mask_params, golden("isda", "a_kernels"))
    else:
        close(last.mask_params[:, :100], golden("isda", "bc_kernels_q100"))
    close(torch.stack([layer.class_logits[:, :10] for layer in output.layers]), golden("isda", f"{name}_logits_aux"))
    close(torch.stack([layer.mask_params[:, :4] for layer in output.layers]), golden("isda", f"{name}_kernels_aux"))
    masks = torch.stack([dynamic_conv(own, kernels) for own, kernels in zip(features, last.mask_params, strict=True)])
    close(masks[:, :4], golden("isda", f"{name}_mask_logits_q4"), 1e-3)
    close(torch.stack([masks.mean(), masks.std()]), golden("isda", f"{name}_mask_logits_stats"), 1e-3)


def test_an_image_that_needs_padding_has_the_official_logits():
    logits = run("d")[0].layers[-1].class_logits
    assert list(batch("d").pixels.shape[2:]) == golden("isda", "d_input_size").tolist()
    close(torch.stack([logits.mean(), logits.std()]), golden("isda", "d_logits_stats"))


def official_terms(key: str) -> dict[str, float]:
    """Return the official terms under our names."""
    terms = {}
    for name, value in zip(notes("isda")["loss_names"], golden("isda", key).tolist(), strict=True):
        layer, _, term = name.rpartition(".")
        ours = {"loss_cls": "class", "loss_mask": "mask"}[term]
        terms[f"{ours}/{layer[1:]}" if layer else ours] = value
    return terms


@pytest.mark.parametrize("name", ["a", "bc"])
def test_loss_terms_are_the_official_ones(name):
    terms, expected = run(name)[1], official_terms(f"{name}_loss_values")
    assert terms.keys() == expected.keys()
    for key, value in expected.items():
        assert terms[key] == pytest.approx(value, rel=2e-6), key
    assert sum(terms.values()) == pytest.approx(golden("isda", f"{name}_loss_total").item(), rel=2e-6)


def test_loss_terms_without_any_object_are_the_official_ones():
    terms = model().loss(run("a")[0], batch("a"), [objects("a")[0][[]]])
    for key, value in official_terms("empty_loss_values").items():
        assert terms[key].item() == pytest.approx(value, rel=2e-6, abs=0), key


@pytest.mark.parametrize("name", ["a", "bc"])
def test_gradients_are_the_official_ones(name):
    grads = run(name)[2]
    grads = grads | {"query": torch.cat([grads["query_position"], grads["query_content"]], 1)}
    expected = golden("isda", f"{name}_grad_norms")
    for official, norm in zip(notes("isda")["grad_params"], expected.tolist(), strict=True):
        (ours,) = rename({official: torch.zeros(0)}, RULES)
        assert grads[ours].norm().item() == pytest.approx(norm, rel=1e-3), official
    assert not [key for key in grads if key.startswith(("backbone.body.conv1", "backbone.body.layer1"))]


@pytest.mark.parametrize("name", ["a", "bc"])
def test_matches_are_the_official_ones(name, monkeypatch):
    kept: list[Matches] = []
    monkeypatch.setattr("maskset.systems.isda.match", recording(kept))
    model().loss(run(name)[0], batch(name), objects(name))
    for i, prefix in enumerate(IMAGES[name]):
        for layer, expected in enumerate(golden("isda", f"{prefix}_match_query")):
            chosen = (kept[0].layer == layer) & (kept[0].image == i)
            assert torch.equal(kept[0].slot[chosen][kept[0].object[chosen].argsort()], expected.long())


@pytest.mark.parametrize("name", ["a", "bc"])
def test_targets_and_costs_equal_the_official_ones(name):
    output, found = run(name)[0], objects(name)
    size = tuple(output.mask_features.shape[2:])
    masks = [downsample_by_stride(one.masks, 4, size) for one in found]
    last = output.layers[-1]
    mask_cost = 3 * _mask_cost(last.mask_params[None], output.mask_features, masks)[0]
    class_cost = 2 * focal_cost(last.class_logits[None], detection.pad([one.labels for one in found]), eps=1e-12)[0]
    for i, prefix in enumerate(IMAGES[name]):
        assert torch.equal(masks[i], golden("isda", f"{prefix}_target_masks_quarter").float())
        close(mask_cost[i, :, : len(found[i])], golden("isda", f"{prefix}_cost_mask"))
        close(class_cost[i, :, : len(found[i])], golden("isda", f"{prefix}_cost_cls"))


def different(found: Masks, key: str) -> torch.Tensor:
    """Return the share of pixels in which each of the first masks differs from the stored one."""
    expected = unpacked("isda", key, found.size[1])
    return (found[: len(expected)].dense() != expected).float().mean((1, 2))


@pytest.mark.parametrize("name", ["a", "bc", "d"])
def test_candidates_are_the_official_ones(name):
    output = run(name)[0]
    last = output.layers[-1]
    for i, prefix in enumerate(IMAGES[name]):
        scores, labels, slots, drawn = _candidates(last.class_logits[i], last.mask_params[i], output.mask_features[i], 100, 0.0)
        by_class, index = last.class_logits[i].sigmoid().flatten().topk(100)
        assert torch.equal(index // 80, golden("isda", f"{prefix}_det_query").long())
        assert torch.equal(labels, golden("isda", f"{prefix}_det_labels").long())
        close(by_class, golden("isda", f"{prefix}_det_cls_scores"), 1e-5)
        close(scores, golden("isda", f"{prefix}_det_scores"), 1e-3)
        size = tuple(golden("isda", f"{prefix}_det_mask_size").tolist())
        masks = paint_probabilities(drawn, 4, INPUTS[name][i][1:], size)[slots.tolist()]
        assert (different(masks, f"{prefix}_det_masks_packed") <= 1e-3).all()
        assert (masks.areas() - golden("isda", f"{prefix}_det_areas")).abs().max() <= 1e-3 * size[0] * size[1]


def test_masks_at_the_size_of_the_original_image_are_the_official_ones():
    output = run("a")[0]
    last = output.layers[-1]
    _, _, slots, drawn = _candidates(last.class_logits[0], last.mask_params[0], output.mask_features[0], 100, 0.0)
    masks = paint_probabilities(drawn, 4, (192, 256), (150, 201))[slots.tolist()]
    assert (different(masks, "a_rescaled_masks_packed") <= 1e-3).all()
    assert (masks.areas() - golden("isda", "a_rescaled_areas")).abs().max() <= 1e-3 * 150 * 201


@pytest.mark.parametrize("name", ["a", "bc", "d"])
def test_results_are_the_official_ones_best_first(name):
    """The official code leaves the candidates in the order of the class, ours are in that of the score."""
    output = run(name)[0]
    last = output.layers[-1]
    sizes = [tuple(golden("isda", f"{prefix}_det_mask_size").tolist()) for prefix in IMAGES[name]]
    for i, found in enumerate(model().postprocess(output, batch(name), sizes)):
        prefix = IMAGES[name][i]
        close(found.scores, golden("isda", f"{prefix}_det_scores").sort(descending=True).values, 1e-3)
        scores, labels, slots, drawn = _candidates(last.class_logits[i], last.mask_params[i], output.mask_features[i], 100, 0.0)
        order = scores.argsort(descending=True, stable=True)
        assert torch.equal(found.scores, scores[order])
        assert torch.equal(found.labels, labels[order])
        assert found.masks == paint_probabilities(drawn, 4, INPUTS[name][i][1:], sizes[i])[slots[order].tolist()]
        assert torch.equal(found.boxes, found.masks.boxes())
