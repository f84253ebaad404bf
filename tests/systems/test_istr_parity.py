"""ISTR against what the official code computes, full size, through the converter; golden/istr.json explains the arrays."""

import dataclasses
import functools

import pytest
import torch
from goldens import ellipses, golden, image, notes, weights

from maskset import boxes as box_ops
from maskset import matching
from maskset.conversion import convert
from maskset.conversion.coco import used_categories
from maskset.conversion.istr import RULES
from maskset.conversion.keys import rename
from maskset.layers import roi
from maskset.masks.boxed import crop
from maskset.matching import Matches
from maskset.structures import ImageBatch, Instances, Masks, ModelOutput, SlotPredictions
from maskset.systems import build

STAGES = 6
INPUTS = {"a": [("istr-a", 192, 256)], "bc": [("istr-b", 160, 224), ("istr-c", 192, 160)]}
TARGETS = {"a": ["istr-targets"], "bc": ["istr-targets", "istr-targets-c"]}
LABELS = [1, 3, 3, 17, 44]
TERMS = {
    "class": "loss_ce",
    "box_l1": "loss_bbox",
    "box_giou": "loss_giou",
    "mask_code": "loss_feat",
    "mask_dice": "loss_dice",
}
GRADIENTS = [
    "pos_embeddings.weight",
    "init_proposal_boxes.weight",
    "head.head_series.0.self_attn.in_proj_weight",
    "head.head_series.0.inst_interact.dynamic_layer.weight",
    "head.head_series.3.bboxes_delta.weight",
    "head.head_series.5.inst_interact.out_layer.weight",
    "head.head_series.5.mask_logits.weight",
    "head.head_series.5.class_logits.weight",
]


def official_state() -> dict[str, torch.Tensor]:
    state = weights(notes("istr")["state_dict"])
    for name in ("components", "explained_variances", "means"):
        state[f"mask_encoding.{name}"] = golden("istr", f"pca.{name}")
    return state | {"init_proposal_boxes.weight": golden("istr", "init_proposal_boxes")}


@functools.cache
def model():
    """Return the official R50 model, filled by the recipe, with the targets' softness fixed as the reference has it."""
    config, state = convert("istr", official_state())
    network = build(dataclasses.replace(config, target_noise=False), used_categories())
    network.load_state_dict(state, strict=True)
    return network


def batch(name: str) -> ImageBatch:
    return ImageBatch.from_images([image(*entry) for entry in INPUTS[name]], divisor=32)


def objects(name: str) -> list[Instances]:
    found = []
    for (_, height, width), key in zip(INPUTS[name], TARGETS[name], strict=True):
        masks = Masks.from_dense(ellipses(key, height, width, len(LABELS)))
        found.append(Instances(torch.tensor(LABELS), masks.boxes(), masks, None, used_categories()))
    return found


@functools.cache
def run(name: str):
    """Return output, loss terms, gradients and what the parts gave, of one set."""
    network = model()
    seen: dict[str, torch.Tensor] = {}
    watched = {
        "self_attn.0": network.stages[0].encoder.self_attention,
        "dynamic.0": network.stages[0].encoder.region_attention,
        **{f"obj_features.{i}": stage.encoder for i, stage in enumerate(network.stages)},
    }
    hooks = [
        part.register_forward_hook(lambda _m, _i, out, key=key: seen.__setitem__(key, out[0] if isinstance(out, tuple) else out))
        for key, part in watched.items()
    ]
    for i, stage in enumerate(network.stages):
        hooks.append(stage.encoder.register_forward_hook(lambda _m, given, _o, i=i: seen.__setitem__(f"roi.{i}", given[1])))
    for kind, part in (("res", network.backbone), ("p", network.pyramid)):
        hooks.append(
            part.register_forward_hook(
                lambda _m, _i, out, kind=kind: seen.update({f"{kind}{i + 2}": x for i, x in enumerate(out)})
            )
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
    seen = {key: value.detach() for key, value in seen.items()}
    layers = [SlotPredictions(p.class_logits.detach(), p.mask_params.detach(), p.boxes.detach()) for p in output.layers]
    return ModelOutput(layers), {key: value.item() for key, value in terms.items()}, grads, seen


def close(found: torch.Tensor, expected: torch.Tensor, atol: float, rtol: float = 0) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=rtol)


def absolute(boxes: torch.Tensor, images: ImageBatch) -> torch.Tensor:
    """Return fractions as corners in pixels."""
    return box_ops.to_corners(boxes) * images.sizes.flip(1).repeat(1, 2)[:, None]


def test_the_model_has_the_official_parameters():
    frozen = sum(buffer.numel() for key, buffer in model().named_buffers() if key.startswith("backbone."))
    code = sum(buffer.numel() for key, buffer in model().named_buffers() if key.startswith("codec.")) - 1  # fitted
    parameters = sum(p.numel() for p in model().parameters())
    assert round(parameters / 1e6 + code / 1e6, 2) == 108.41
    assert round((parameters + frozen + code) / 1e6, 2) == 108.52


@pytest.mark.parametrize("name", ["a", "bc"])
def test_the_pyramid_is_the_official_one(name):
    images, seen = batch(name), run(name)[3]
    assert images.sizes.tolist() == golden("istr", f"{name}.input_sizes").tolist()
    assert list(images.pixels.shape[2:]) == golden("istr", f"{name}.padded_size").tolist()
    close(images.pixels[:, :, :4, :4], golden("istr", f"{name}.input.slice"), 1e-5)
    for level in (2, 3, 4, 5):
        for key, found in ((f"backbone.res{level}", seen[f"res{level}"]), (f"fpn.p{level}", seen[f"p{level}"])):
            assert list(found.shape) == golden("istr", f"{name}.{key}.shape").tolist()
            close(found.mean(), golden("istr", f"{name}.{key}.mean"), 1e-5)
            close(found.std(correction=0), golden("istr", f"{name}.{key}.std"), 1e-5)
            close(found[:, :8, :4, :4], golden("istr", f"{name}.{key}.slice"), 1e-5)
            close(found.mean((2, 3)), golden("istr", f"{name}.{key}.chmean"), 1e-5)


@pytest.mark.parametrize("name", ["a", "bc"])
def test_every_stage_is_the_official_one(name):
    output, _, _, seen = run(name)
    count = len(INPUTS[name])
    for key in ("self_attn.0", *(f"obj_features.{i}" for i in range(STAGES))):
        close(seen[key][:, :8], golden("istr", f"{name}.{key}.slice"), 1e-4)
    close(seen["dynamic.0"].unflatten(0, (count, -1))[:, :8], golden("istr", f"{name}.dynamic.0.slice"), 1e-4)
    for i in (0, 5):
        close(seen[f"roi.{i}"].unflatten(0, (count, -1))[:, :8, :8], golden("istr", f"{name}.roi.{i}.slice"), 1e-4)
    boxes = torch.stack([absolute(layer.boxes, batch(name)) for layer in output.layers])
    close(boxes, golden("istr", f"{name}.boxes"), 2.1e-2)
    scale = golden("istr", f"{name}.boxes").abs().amax((1, 2, 3), keepdim=True)
    close(boxes / scale, golden("istr", f"{name}.boxes") / scale, 1.5e-5)
