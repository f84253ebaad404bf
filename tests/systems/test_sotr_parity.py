"""SOTR against what the official code computes, full size, through the converter; golden/sotr.json explains the arrays."""

import copy
import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from goldens import ellipses, golden, notes, recipe, weights

from maskset.conversion import convert
from maskset.conversion.class_names import used_categories
from maskset.conversion.keys import rename
from maskset.conversion.sotr import rules
from maskset.instances import Instances, Masks
from maskset.losses import squared_dice_loss
from maskset.masks.heads.features import dynamic_conv
from maskset.masks.nms import mask_iou, matrix_nms
from maskset.masks.targets import downsample_by_4_opencv
from maskset.structures import ImageBatch, ModelOutput, SlotPredictions
from maskset.systems import build
from maskset.systems.sotr import Candidates, Sotr, assign, point_nms

SETS = ["a", "bc"]
INPUTS = {"a": [("sotr-a", 256, 320)], "bc": [("sotr-b", 224, 320), ("sotr-c", 256, 192)]}
TARGETS = {"a": ["sotr-targets"], "bc": ["sotr-targets", "sotr-targets-c"]}
LABELS = [1, 3, 3, 17, 44]
GRIDS = (40, 36, 24, 16, 12)
P5 = 4  # of the six calls of the transformer, official order: four grids, P5 as it is, the last grid


@functools.cache
def model() -> Sotr:
    """Return the official model, filled by the recipe."""
    state = weights(notes("sotr")["state_dict"])
    state |= {name: golden("sotr", f"override.{name}") for name in notes("sotr")["overrides"]}
    config, ours = convert("sotr", state)
    network = build(config, used_categories()).eval()
    network.load_state_dict(ours, strict=True)
    return network


def batch(name: str) -> ImageBatch:
    mean = torch.tensor([103.53, 116.28, 123.675]).view(3, 1, 1)
    images = [torch.from_numpy(recipe.image(*entry)).flip(0) * 255 - mean for entry in INPUTS[name]]
    return ImageBatch.from_images(images, divisor=32)


def objects(name: str) -> list[Instances]:
    found = []
    for (_, height, width), key, boxes in zip(INPUTS[name], TARGETS[name], golden("sotr", f"{name}.target.boxes"), strict=True):
        masks = Masks.from_dense(ellipses(key, height, width, len(LABELS)))
        found.append(Instances(torch.tensor(LABELS), boxes, masks, None, used_categories()))
    return found


@functools.cache
def exact(name: str) -> ModelOutput:
    """Return the output of one set, computed in float64: in float32 the last digits depend on the processor."""
    network, images = copy.deepcopy(model()).double(), batch(name)
    with torch.no_grad():
        output = network(ImageBatch(images.pixels.double(), images.sizes))
    (layer,) = output.layers
    return ModelOutput([SlotPredictions(layer.class_logits.float(), layer.mask_params.float())], output.mask_features.float())


@functools.cache
def run(name: str):
    """Return output, loss terms, gradients, and what the parts gave, of one set."""
    network = model()
    seen: dict[str, list[torch.Tensor]] = {}
    watched = {
        "transformer": network.transformer,
        **{f"fpn.p{i + 2}": part for i, part in enumerate(network.pyramid.output)},
        **{f"mask_branch.{i}": branch[-1] for i, branch in enumerate(network.mask_feature_head.branches)},
    }
    hooks = [
        part.register_forward_hook(lambda _m, _i, out, key=key: seen.setdefault(key, []).append(out.detach()))
        for key, part in watched.items()
    ]
    hooks.append(
        network.backbone.register_forward_hook(
            lambda _m, _i, out: seen.update({f"backbone.res{i + 2}": [x.detach()] for i, x in enumerate(out)})
        )
    )
    hooks.append(
        network.transformer.register_forward_pre_hook(lambda _m, given: seen.setdefault("grid", []).append(given[0].detach()))
    )
    images = batch(name)
    output = network(images)
    terms = network.loss(output, images, objects(name))
    network.zero_grad()
    torch.stack(list(terms.values())).sum().backward()
    grads = {key: p.grad.clone() for key, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    for hook in hooks:
        hook.remove()
    (layer,) = output.layers
    output = ModelOutput(
        [SlotPredictions(layer.class_logits.detach(), layer.mask_params.detach())], mask_features=output.mask_features.detach()
    )
    return output, {key: value.item() for key, value in terms.items()}, grads, seen


def close(found: torch.Tensor, expected: torch.Tensor, greatest: float = 1.0, rel: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, atol=rel * max(1.0, greatest), rtol=0)


def check(name: str, key: str, found: torch.Tensor) -> None:
    """Compare a map with its stored statistics and corner."""
    greatest = float(found.abs().max())
    assert list(found.shape) == golden("sotr", f"{name}.{key}.shape").tolist()
    close(found.mean(), golden("sotr", f"{name}.{key}.mean"))
    close(found.std(correction=0), golden("sotr", f"{name}.{key}.std"))
    close(found.mean((2, 3)), golden("sotr", f"{name}.{key}.chmean"), greatest)
    close(found[:, :8, :4, :4], golden("sotr", f"{name}.{key}.slice"), greatest)


def squares(slots: torch.Tensor) -> list[torch.Tensor]:
    """Return what was said about every cell as one map [B numbers S S] for each grid."""
    parts = slots.split([side**2 for side in GRIDS], 1)
    return [part.transpose(1, 2).unflatten(2, (side, side)) for part, side in zip(parts, GRIDS, strict=True)]


def test_the_model_has_the_official_number_of_parameters():
    assert len(notes("sotr")["state_dict"]) == 549
    assert round(sum(p.numel() for p in model().parameters()) / 1e6, 2) == 63.16
    assert round(sum(p.numel() for p in model().transformer.parameters()) / 1e6, 1) == 34.6


@pytest.mark.parametrize("name", SETS)
def test_backbone_and_pyramid_are_the_official_ones(name):
    images, seen = batch(name), run(name)[3]
    assert list(images.pixels.shape[2:]) == golden("sotr", f"{name}.padded_size").tolist()
    assert torch.equal(images.sizes, golden("sotr", f"{name}.input_sizes"))
    close(images.pixels[:, :, :4, :4], golden("sotr", f"{name}.input.slice"))
    for key in (f"backbone.res{i}" for i in (2, 3, 4, 5)):
        check(name, key, seen[key][0])
    levels = [seen[f"fpn.p{i}"][0] for i in (2, 3, 4, 5)]
    for i, level in enumerate([*levels, F.max_pool2d(levels[-1], 1, 2)]):
        check(name, f"fpn.p{i + 2}", level)
    for i, level in enumerate(model()._levels(levels)):
        check(name, f"split.{i}", level)


@pytest.mark.parametrize("name", SETS)
def test_grids_and_transformer_are_the_official_ones(name):
    seen = run(name)[3]
    for i in range(5):
        check(name, f"grid.{i}", seen["grid"][i])
        check(name, f"transformer.grid.{i}", seen["transformer"][i])
    check(name, "transformer.p5", seen["transformer"][5])


@pytest.mark.parametrize("name", SETS)
def test_every_branch_of_the_plain_first_and_last_layer_is_the_official_one(name, monkeypatch):
    transformer, outputs = model().transformer, {}
    monkeypatch.setattr(transformer, "fast", False)
    first, last = transformer.layers[0], transformer.layers[-1]
    branches = {
        "0.0": (first.gates[0], first.columns),
        "0.1": (first.gates[1], first.rows),
        "1.0": (first.gates[2], first.convolutions[0]),
        "1.1": (first.gates[3], first.convolutions[1]),
        "23.0": (last.gates[2], last.convolutions[0]),
        "23.1": (last.gates[3], last.convolutions[1]),
    }
    hooks = [
        part.register_forward_hook(lambda _m, _i, out, key=key: outputs.update({key: out})) for key, (_, part) in branches.items()
    ]
    with torch.no_grad():
        transformer(run(name)[3]["grid"][5])
    for hook in hooks:
        hook.remove()
    for key, (gate, _) in branches.items():
        branch, expected = gate.detach() * outputs[key], golden("sotr", f"{name}.block.{key}.p5.slice")
        close(branch.permute(0, 3, 1, 2)[:, : expected.shape[1]], expected, float(branch.abs().max()))


@pytest.mark.parametrize("name", SETS)
def test_logits_kernels_and_mask_features_are_the_official_ones(name):
    output, _, _, seen = run(name)
    (layer,) = output.layers
    for i, (logits, kernels) in enumerate(zip(squares(layer.class_logits), squares(layer.mask_params), strict=True)):
        greatest = float(logits.abs().max())
        if f"{name}.cate_logits.{i}" in notes("sotr")["arrays"]:
            close(logits, golden("sotr", f"{name}.cate_logits.{i}"), greatest)
        else:
            expected = golden("sotr", f"{name}.cate_logits.{i}.slice")
            step = -(-GRIDS[i] // expected.shape[-1])
            close(logits[:, :, ::step, ::step], expected, greatest)
        close(kernels[:, ::8, ::2, ::2], golden("sotr", f"{name}.kernels.{i}.slice"), float(kernels.abs().max()))
    features = output.mask_features
    close(features[:, ::8, ::4, ::4], golden("sotr", f"{name}.mask_feats.slice"), float(features.abs().max()))
    for i in range(4):
        branch = seen[f"mask_branch.{i}"][0]
        branch = F.interpolate(branch, scale_factor=2.0, mode="bilinear") if i else branch
        check(name, f"mask_branch.{i}", branch)


@pytest.mark.parametrize("name", SETS)
def test_targets_are_the_official_ones(name):
    size = tuple(golden("sotr", f"{name}.target.feat_size").tolist())
    cells = 0
    for i, found in enumerate(objects(name)):
        pairs = assign(found, size, model().config)
        shown = pairs.object_of_slot(sum(side**2 for side in GRIDS))
        classes = torch.where(shown >= 0, found.labels[shown], 80)
        cells += int((shown >= 0).sum())
        before = 0
        for level, side in enumerate(GRIDS):
            key = f"{name}.target.{i}"
            here = (pairs.cells >= before) & (pairs.cells < before + side**2)
            order = pairs.cells[here] - before
            assert torch.equal(classes[before : before + side**2].view(side, side), golden("sotr", f"{key}.cate.{level}").long())
            assert torch.equal(order, golden("sotr", f"{key}.order.{level}").long())
            masks = downsample_by_4_opencv(found.masks, size)[pairs.objects[here]]
            assert torch.equal(masks, golden("sotr", f"{key}.masks.{level}").bool())
            before += side**2
    assert cells == golden("sotr", f"{name}.target.num_ins")


@pytest.mark.parametrize("name", SETS)
def test_the_loss_of_every_pair_is_the_official_one(name):
    output, found = run(name)[0], objects(name)
    size = tuple(output.mask_features.shape[2:])
    pairs = [assign(own, size, model().config) for own in found]
    terms, before = [], 0
    for side in GRIDS:
        for i, own in enumerate(pairs):
            here = (own.cells >= before) & (own.cells < before + side**2)
            drawn = dynamic_conv(output.mask_features[i], output.layers[0].mask_params[i, own.cells[here]]).sigmoid()
            masks = downsample_by_4_opencv(found[i].masks, size)[own.objects[here]].float()
            terms.append(squared_dice_loss(drawn, masks, eps=0.002))
        before += side**2
    close(torch.cat(terms), golden("sotr", f"{name}.dice_terms"))


@pytest.mark.parametrize("name", SETS)
def test_loss_terms_are_the_official_ones(name):
    terms = run(name)[1]
    assert terms["mask"] == pytest.approx(golden("sotr", f"{name}.loss.loss_ins").item(), rel=1e-4)
    assert terms["class"] == pytest.approx(golden("sotr", f"{name}.loss.loss_cate").item(), rel=1e-4)
    assert sum(terms.values()) == pytest.approx(golden("sotr", f"{name}.loss.total").item(), rel=1e-4)


@pytest.mark.parametrize("name", SETS)
def test_gradients_are_the_official_ones(name):
    grads = dict(run(name)[2])
    for i in range(12):
        path = f"transformer.layers.{i}"
        for part in ("columns", "rows"):
            grads[f"{path}.{part}.key_value.weight"] = torch.cat([grads[f"{path}.{part}.{w}.weight"] for w in ("key", "value")])
        grads |= {f"{path}.gate.{j}": gate for j, gate in enumerate(grads[f"{path}.gates"])}
    compared = [key for key in notes("sotr")["arrays"] if key.startswith(f"{name}.gradnorm.")]
    for key in compared:
        (ours,) = rename({key.removeprefix(f"{name}.gradnorm."): torch.zeros(0)}, rules(12))
        assert grads[ours].norm().item() == pytest.approx(golden("sotr", key).item(), rel=1e-4), key
    assert len(compared) == 15
    assert not [key for key in grads if key.startswith(("backbone.body.conv1", "backbone.body.layer1"))]


def scores(name: str) -> torch.Tensor:
    return point_nms(exact(name).layers[0].class_logits.sigmoid(), GRIDS)


@pytest.mark.parametrize("name", SETS)
def test_point_nms_leaves_as_many_cells_as_officially(name):
    for level, part in enumerate(squares(scores(name))):
        for i in range(len(part)):
            assert abs(int((part[i] > 0).sum()) - int(golden("sotr", f"{name}.point_nms.{level}.kept")[i])) <= 1
            assert abs(int((part[i] > 0.1).sum()) - int(golden("sotr", f"{name}.point_nms.{level}.above")[i])) <= 1


def in_official_order(found: Candidates, expected: dict[str, torch.Tensor]) -> Candidates:
    """Return the candidates with neighbors of nearly equal scores in the official order: by label and area."""
    group = F.pad((expected["scores_in"].diff().abs() > 2e-5).cumsum(0), (1, 0))
    ours = np.lexsort((found.masks.sum((1, 2)), found.labels, group))
    official = np.lexsort((expected["sum_masks"], expected["labels"], group))
    rows = torch.from_numpy(ours)[np.argsort(official)]
    return Candidates(found.cells[rows], found.labels[rows], found.scores[rows], found.masks[rows])


def with_official_pixels(found: Candidates, areas: torch.Tensor, image: int, name: str) -> Candidates:
    """Return the candidates with one pixel flipped in masks whose area is not the official one.

    Such a pixel is as near to one half as float32 can tell, so it depends on the order of a sum.
    """
    output, scores, masks = exact(name), found.scores.clone(), found.masks.clone()
    for i in (masks.sum((1, 2)) != areas).nonzero()[:, 0].tolist():
        kernel = output.layers[0].mask_params[image, found.cells[i]][None]
        drawn = dynamic_conv(output.mask_features[image], kernel).sigmoid()[0]
        pixel = (drawn - 0.5).abs().argmin()
        assert (drawn.flatten()[pixel] - 0.5).abs() < 1e-5
        masks[i].view(-1)[pixel] ^= True
        scores[i] *= drawn[masks[i]].mean() / drawn[found.masks[i]].mean()
    assert torch.equal(masks.sum((1, 2)), areas)
    return Candidates(found.cells, found.labels, scores, masks)


@pytest.mark.parametrize("name", SETS)
def test_matrix_nms_is_the_official_one(name):
    output = exact(name)
    for i, own in enumerate(scores(name)):
        found = model()._candidates(own, output.layers[0].mask_params[i], output.mask_features[i], 500)
        expected = {key: golden("sotr", f"{name}.nms.{i}.{key}") for key in ("labels", "sum_masks", "scores_in", "scores_out")}
        found = with_official_pixels(in_official_order(found, expected), expected["sum_masks"], i, name)
        assert torch.equal(found.labels, expected["labels"])
        close(found.scores, expected["scores_in"], rel=1e-5)
        close(found.scores * matrix_nms(mask_iou(found.masks), found.labels, "gaussian"), expected["scores_out"], rel=1e-5)


@pytest.mark.parametrize("name", SETS)
def test_results_are_the_official_ones(name):
    output = exact(name)
    sizes = [tuple(size) for size in golden("sotr", f"{name}.output_sizes").tolist()]
    for i, found in enumerate(model().postprocess(output, batch(name), sizes)):
        key = f"{name}.result.{i}"
        close(found.scores, golden("sotr", f"{key}.scores"))
        assert torch.equal(found.labels, golden("sotr", f"{key}.labels"))
        assert (found.masks.areas() - golden("sotr", f"{key}.mask_areas")).abs().max() <= 2
        assert torch.equal(found[:10].masks.dense(), golden("sotr", f"{key}.masks").bool())
        assert torch.equal(found.boxes, found.masks.boxes())
