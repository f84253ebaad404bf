"""SOIT against what the official code computes, full size, through the converter; golden/soit.json explains the arrays."""

import copy
import functools
import math
import re

import pytest
import torch
from goldens import ellipses, golden, image, notes, unpacked, weights
from on_device import recording

from maskset.conversion import convert
from maskset.conversion.keys import rename, rename_proposal_class_head
from maskset.conversion.soit import RULES
from maskset.detection import Matches
from maskset.instances import Instances, Masks
from maskset.masks.heads.instance_transformer import encode_positions, instance_transformer
from maskset.masks.resize import aligned_bilinear, resample
from maskset.structures import ImageBatch
from maskset.systems import build

LAYERS = 6
INPUTS = {"a": [("soit-a", 192, 256)], "bc": [("soit-b", 160, 224), ("soit-c", 192, 160)]}
TARGETS = {"a": ["soit-targets"], "bc": ["soit-targets-b", "soit-targets-c"]}
TERMS = {"class": "cls", "box_l1": "bbox", "box_giou": "iou", "mask_dice": "mask_dice", "mask_bce": "mask_bce"}
SETS = ["a", "bc", "bcn"]


@functools.cache
def model():
    """Return the official R50 model, filled by the recipe. Its copies of the mask head differ: the last wins, as officially."""
    config, state = convert("soit", weights(notes("soit")["state_dict"]), use_last_copy=True)
    network = build(config).eval()
    network.load_state_dict(state, strict=True)
    return network


def base(name: str) -> str:
    return name.removesuffix("n")


def batch(name: str) -> ImageBatch:
    return ImageBatch.from_images([image(*entry) for entry in INPUTS[base(name)]])


def objects(name: str) -> list[Instances]:
    found = []
    for i, (key, (_, height, width)) in enumerate(zip(TARGETS[base(name)], INPUTS[base(name)], strict=True)):
        labels = golden("soit", f"{name}.target{i}.labels")
        masks = Masks.from_dense(ellipses(key, height, width, len(labels)))
        found.append(Instances(labels, masks.boxes(), masks, None, model().categories))
    return found


@functools.cache
def run(name: str):
    """Return output, loss terms, matches (decoder, then proposals) and what some parts saw, of one set."""
    network = model()
    head = network.proposal_class_head.weight
    if name == "bcn":
        head.data.neg_()
    seen: dict[str, torch.Tensor] = {}
    watched = {
        "mask_encoder": network.mask_encoder.layers[0],
        "encoder": network.encoder.layers[-1],
        "queries": network.proposals.query_norm,
        **{f"P{i + 3}": norm for i, norm in enumerate(network.project.norms)},
        **{f"hs{i}": layer for i, layer in enumerate(network.decoder)},
    }
    hooks = [part.register_forward_hook(lambda _m, _i, out, key=key: seen.__setitem__(key, out)) for key, part in watched.items()]
    matches: list[Matches] = []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("maskset.detection.match", recording(matches))
        output = network(batch(name))
        terms = network.loss(output, batch(name), objects(name))
    for hook in hooks:
        hook.remove()
    if name == "bcn":
        head.data.neg_()
    return output, {key: value.item() for key, value in terms.items()}, matches, {k: v.detach() for k, v in seen.items()}


def close(found: torch.Tensor, expected: torch.Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def close_moments(found: torch.Tensor, name: str) -> None:
    close(torch.stack([found.mean(), found.std()]), golden("soit", f"{name}.mean_std"))


def chosen(name: str) -> torch.Tensor:
    """Return which cell each of our queries comes from [B N]."""
    logits = run(name)[0].proposals.class_logits[..., 0]
    return logits.topk(300, dim=1).indices


def order(name: str) -> list[torch.Tensor]:
    """Return for each image our query for each official one, by the cell that both come from."""
    theirs = golden("soit", f"{name}.enc.topk_indices")
    return [(wanted[:, None] == cells[None]).float().argmax(1) for wanted, cells in zip(theirs, chosen(name), strict=True)]


def aligned(name: str, values: torch.Tensor) -> torch.Tensor:
    """Return values [B N ...] in the official order of the queries."""
    return torch.stack([rows[index] for rows, index in zip(values, order(name), strict=True)])


def test_the_model_has_the_official_parameters():
    """Frozen are the stem, the first stage and all batch norms; five of the six mask heads are copies."""
    frozen = re.compile(r"backbone\.(conv1|layer1)|.*\.(bn\d|downsample\.1)\.|bbox_head\.seg_branches\.[0-4]\.|backbone\.bn1")
    official = sum(math.prod(shape) for name, shape in notes("soit")["state_dict"] if not frozen.match(name))
    assert sum(p.numel() for p in model().parameters() if p.requires_grad) == official


@pytest.mark.parametrize("name", SETS)
def test_every_stage_is_the_official_one(name):
    output, _, _, seen = run(name)
    valid = ~golden("soit", f"{name}.mask_padding").bool()
    for level in ("P3", "P4", "P5", "P6"):
        close_moments(seen[level], f"{name}.neck.{level}")
        close(seen[level][:, :8, :4, :4], golden("soit", f"{name}.neck.{level}.slice"))
    features = output.mask_features.flatten(2).transpose(1, 2)
    close(features[valid], golden("soit", f"{name}.mask_feature")[valid])
    close(seen["mask_encoder"][:, ::17, :32][valid[:, ::17]], golden("soit", f"{name}.seg_encoder.slice")[valid[:, ::17]])
    if name == "a":
        close_moments(seen["encoder"], f"{name}.encoder.memory")
        close(seen["encoder"][:, ::17, :32], golden("soit", f"{name}.encoder.memory.slice"))


@pytest.mark.parametrize("name", SETS)
def test_padded_cells_are_the_official_ones_too(name):
    features = run(name)[0].mask_features.flatten(2).transpose(1, 2)
    close(features, golden("soit", f"{name}.mask_feature"), 1e-3)  # an encoding of float32's last bit goes in


@pytest.mark.parametrize("name", SETS)
def test_the_same_cells_propose_queries(name):
    output = run(name)[0]
    close(output.proposals.class_logits[..., 0], golden("soit", f"{name}.enc.cls0_logits"))
    close(output.proposals.boxes, golden("soit", f"{name}.enc.boxes"))
    assert torch.equal(chosen(name).sort(1).values, golden("soit", f"{name}.enc.topk_indices").sort(1).values)


@pytest.mark.parametrize("name", SETS)
def test_predictions_are_the_official_ones(name):
    output, _, _, seen = run(name)
    last = output.layers[-1]
    close(aligned(name, last.class_logits), golden("soit", f"{name}.cls_logits"))
    close(aligned(name, last.mask_params)[:, :100], golden("soit", f"{name}.dynamic_params"))
    boxes = torch.stack([aligned(name, layer.boxes) for layer in output.layers])
    close(boxes, golden("soit", f"{name}.decoder.boxes"))
    close(aligned(name, seen["hs5"])[:, ::4, :64], golden("soit", f"{name}.decoder.hs.last.slice"))
    for i, layer in enumerate(output.layers):
        for ours, theirs in ((layer.class_logits, "cls_logits.all"), (layer.mask_params, "dynamic_params.all")):
            close(torch.stack([ours.mean(), ours.std()]), golden("soit", f"{name}.{theirs}.mean_std")[i])


@pytest.mark.parametrize("name", SETS)
def test_loss_terms_are_the_official_ones(name):
    terms = run(name)[1]
    assert len(terms) == 5 * LAYERS + 3
    for key, value in terms.items():
        term, _, layer = key.partition("/")
        official = ("enc_" if layer == "proposals" else f"d{layer}." if layer else "") + f"loss_{TERMS[term]}"
        assert value == pytest.approx(golden("soit", f"{name}.loss.{official}").item(), rel=1e-4), key
    assert sum(terms.values()) == pytest.approx(golden("soit", f"{name}.loss.total").item(), rel=1e-5)


@pytest.mark.parametrize("name", SETS)
def test_matches_are_the_official_ones(name):
    decoder, proposals = run(name)[2]
    for i, ours in enumerate(order(name)):
        for layer in range(LAYERS):
            slots, targets = golden("soit", f"{name}.match.d{layer}.image{i}")
            mine = (decoder.layer == layer) & (decoder.image == i)
            assert set(zip(decoder.slot[mine].tolist(), decoder.object[mine].tolist(), strict=True)) == set(
                zip(ours[slots].tolist(), targets.tolist(), strict=True)
            )
        mine = proposals.image == i
        expected = golden("soit", f"{name}.match.enc.image{i}")
        assert torch.equal(torch.stack([proposals.slot[mine], proposals.object[mine]]), expected)


@pytest.mark.parametrize("name", SETS)
def test_gradients_are_the_official_ones(name):
    """In float64: in float32 one activation may be on the other side of ReLU's kink, which moves gradients by 7e-4."""
    network = copy.deepcopy(model()).double()
    if name == "bcn":
        network.proposal_class_head.weight.data.neg_()
    images = ImageBatch(batch(name).pixels.double(), batch(name).sizes)
    torch.stack(list(network.loss(network(images), images, objects(name)).values())).sum().backward()
    grads = {key: parameter.grad.float() for key, parameter in network.named_parameters() if parameter.grad is not None}
    official = [key.removeprefix("a.grad.") for key in notes("soit")["arrays"] if key.startswith(("a.grad.bbox", "a.grad.neck"))]
    assert len(official) == 7
    for theirs in official:
        ours = next(iter(rename_proposal_class_head(rename({theirs: torch.zeros(0)}, RULES), LAYERS)))
        expected = golden("soit", f"{name}.grad.{theirs}")
        close(grads[ours], expected, 2e-4 * expected.abs().max().item())
    total = torch.stack([gradient.norm() for gradient in grads.values()]).norm()
    assert total.item() == pytest.approx(golden("soit", f"{name}.grad.norm").item(), rel=1e-4)


@pytest.mark.parametrize("name", SETS)
def test_masks_at_stride_8_are_the_official_ones(name):
    output = run(name)[0]
    features, last = output.mask_features, output.layers[-1]
    padding = batch(name).padding((features.shape[2], features.shape[3]))
    for i in range(len(features)):
        queries = order(name)[i][golden("soit", f"{name}.det{i}.queries")[:10]]
        logits = model()._draw(features[i], padding[i], last.mask_params[i, queries], last.boxes[i, queries, :2])
        expected = golden("soit", f"{name}.det{i}.mask_logits_p3")
        close(logits[:, ~padding[i]], expected[:, ~padding[i]])
        upsampled = resample(expected[:2], aligned_bilinear(expected.shape[1], 4), aligned_bilinear(expected.shape[2], 4))
        close(upsampled, golden("soit", f"{name}.det{i}.mask_logits_up4"), 1e-5)


@pytest.mark.parametrize("kind", ["input", "rescaled"])
def test_results_are_the_official_ones(kind):
    sizes = [tuple(size) for size in golden("soit", f"a.{'sizes' if kind == 'input' else 'ori_sizes'}").tolist()]
    (found,) = model().postprocess(run("a")[0], batch("a"), sizes)
    close(found.scores, golden("soit", "a.det0.scores"), 1e-5)
    assert torch.equal(found.labels, golden("soit", "a.det0.labels"))
    close(found.boxes, golden("soit", f"a.det0.{kind}.boxes"), 0.02)
    expected = unpacked("soit", f"a.det0.{kind}.masks", sizes[0][0] * sizes[0][1]).view(10, *sizes[0])
    assert (found.masks[:10].dense() != expected).float().mean((1, 2)).max() <= 1e-3
    pixels = sizes[0][0] * sizes[0][1]
    assert (found.masks.areas() - golden("soit", f"a.det0.{kind}.mask_areas")).abs().max() <= 1e-3 * pixels


def test_scores_and_boxes_of_a_padded_batch_are_the_official_ones():
    sizes = [tuple(size) for size in golden("soit", "bcn.sizes").tolist()]
    for i, found in enumerate(model().postprocess(run("bcn")[0], batch("bcn"), sizes)):
        close(found.scores, golden("soit", f"bcn.det{i}.scores"), 1e-5)
        assert torch.equal(found.labels, golden("soit", f"bcn.det{i}.labels"))
        close(found.boxes, golden("soit", f"bcn.det{i}.input.boxes"), 0.02)


def test_the_instance_aware_transformer_alone_is_the_official_one():
    features = golden("soit", "unit.feature").T.reshape(8, 9, 13)
    padding, centers = golden("soit", "unit.padding").bool(), golden("soit", "unit.centres")
    logits = instance_transformer(features, padding, golden("soit", "unit.theta"), centers, 4, 4)
    close(logits, golden("soit", "unit.logits"), 1e-5)
    close(resample(logits, aligned_bilinear(9, 4), aligned_bilinear(13, 4)), golden("soit", "unit.logits_up4"), 1e-5)
    encoded = encode_positions(padding, centers, 8).flatten(2).transpose(1, 2)
    close(encoded, golden("soit", "unit.rel_pos"), 1e-6)
