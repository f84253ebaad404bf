"""Whole models of untrained weights with ResNet-50, from normalized pixels to results, against three of other packages.

One image of 480 x 640 pixels (on a GPU 8 of 800 x 1066), in float32 and under autocast to bfloat16. What is timed: maskset's six
systems, to 100 objects with masks at the image's size as text of COCO's files; transformers' DeformableDetr, to 100 boxes (it has
no masks), and Mask2Former, to 100 dense masks at the image's size; torchvision's Mask R-CNN, to 100 dense masks at the image's
size. On 640 x 640 pixels, Mask R-CNN is compared with Sextant, also as sextant-small with EfficientNet-Lite0. Memory
is that of a process of its own: the greatest while it computes, less what it had with libraries and weights.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import Implementation, in_new_process, in_turn, peaks, require, resident
from benchmarks.report import Report
from maskset import recipes
from maskset.kernels.attention import FUSED, implementations, using
from maskset.masks.codecs.logit_pca import LogitPcaCodec
from maskset.structures import ImageBatch
from maskset.systems import System, build
from maskset.systems.istr import Istr, Stage
from maskset.systems.sextant import Sextant
from maskset.systems.sotr import Sotr, point_nms

SYSTEMS = ("solq", "soit", "isda", "istr", "sotr", "sextant")
DDETR, M2F, MRCNN = "transformers' DeformableDetr", "transformers' Mask2Former", "torchvision's Mask R-CNN"
LIKE = "maskset solq, width 256"  # as the first two
SMALL = "maskset sextant-small"
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MOST = 100  # results of an image
MOST_CELLS = 100  # of SOTR, whose masks are drawn


def run(report: Report, quick: bool) -> None:
    """Measure all models in both precisions, and the memory of each."""
    require("transformers")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, size = (1, (64, 96)) if quick else (8, (800, 1066)) if device == "cuda" else (1, (480, 640))
    models = {name: make(quick) for name, make in MODELS.items()}
    models = {name: model.to(device) for name, model in models.items()}
    pixels = noise(images, size).to(device)
    most = 10 if quick else MOST
    agree(report, models["maskset solq"], pixels)
    for name in (MRCNN, *(f"maskset {name}" for name in SYSTEMS)):
        found = counts(name, results(name, models[name], pixels, most))
        report.agree(f"{name}: results that an image lacks of {most}", most - min(found), 0)
    report.note(
        f"SOTR's score threshold is set so that the masks of about {MOST_CELLS} of its 3,872 cells are drawn, as with trained "
        "weights: untrained scores do not tell good cells from bad ones."
    )
    report.note(
        "SOLQ's transformer is 384 channels wide, as officially, DeformableDetr's and Mask2Former's are 256: an encoder layer's "
        "linear maps have 1.6 times as many products. The row of width 256 compares like with like."
    )
    place = f"{images} image{'s' * (images > 1)} of {size[0]} x {size[1]}"
    for precision, dtype in PRECISIONS.items():
        implementations: dict[str, Implementation] = {
            name: partial(results, name, model, pixels, most, dtype) for name, model in models.items()
        }
        times = in_turn(implementations, 0 if quick else 40)
        report.compare(f"{place}, {precision}", DDETR, times, peaks(implementations) if device == "cuda" else None)
    if device == "cpu":
        named = ["maskset solq"] if quick else [name for name in models if name != LIKE]
        memories = {name: in_new_process(memory, name, pixels, quick) for name in named}
        grown = {name: peak - before for name, (before, peak) in memories.items()}
        report.compare(f"memory of a process, {place}, float32", DDETR, {}, grown)
        for name, (before, peak) in memories.items():
            report.note(f"Memory of {name}: {before:,.0f} MiB before, {peak:,.0f} MiB at most.")
    add_targets(report, place)
    if device == "cpu":
        compare_sextant(report, models, (64, 96) if quick else (640, 640), quick)


def compare_sextant(report: Report, models: Mapping[str, Any], size: tuple[int, int], quick: bool) -> None:
    """Compare Sextant with Mask R-CNN, with targets."""
    case, pixels = f"1 image of {size[0]} x {size[1]}, float32", noise(1, size)
    most = 10 if quick else MOST
    few = {name: partial(results, name, models[name], pixels, most) for name in (MRCNN, "maskset sextant", SMALL)}
    report.compare(f"Sextant: {case}", MRCNN, in_turn(few, 0 if quick else 20), None)
    grown = {name: peak - before for name in few for before, peak in [in_new_process(memory, name, pixels, quick)]}
    report.compare(f"Sextant: memory of a process, {case}", MRCNN, {}, grown)
    for name, least in ((SMALL, 5), ("maskset sextant", 1.5)):
        what = f"of {name.removeprefix('maskset ')} over {MRCNN}: inference, {size[0]} x {size[1]}"
        report.target(f"speed-up {what}", least, report.speedup(f"Sextant: {case}", name, MRCNN))
        report.target(f"memory saving {what}", 1, report.memory_saving(f"Sextant: memory of a process, {case}", name, MRCNN))


def noise(images: int, size: tuple[int, int]) -> Tensor:
    """Return normalized pixels [B 3 h w]."""
    return torch.randn(images, 3, *size, generator=torch.Generator().manual_seed(0))


def system(name: str, quick: bool, recipe: str = "r50", **settings: Any) -> System:
    """Return one of maskset's systems, with thresholds that give enough results."""
    torch.manual_seed(0)
    config = recipes.get(f"{name}-{'tiny' if quick else recipe}").model
    config = replace(config, num_classes=91, **settings)
    if name == "sotr":
        config = replace(config, score_threshold=0.0, final_score_threshold=0.0)
    model = build(config).eval()
    if isinstance(model, Istr):
        steady(model)
    if isinstance(model, Sextant):
        enlarge_boxes(model, 96 if quick else 640)
    if isinstance(model, Sotr):
        draw_few(model, (64, 96) if quick else (480, 640))
    return model


@torch.no_grad()
def steady(model: Istr) -> None:
    """Fit the model's mask codec to noise, and fix its boxes at 4 % of the image, which untrained boxes leave."""
    assert isinstance(model.codec, LogitPcaCodec)
    model.codec.fit((torch.rand(200, model.codec.size, model.codec.size) > 0.5).float())
    model.query_boxes.copy_(torch.tensor([0.5, 0.5, 0.2, 0.2]))
    for stage in model.stages:
        assert isinstance(stage, Stage)
        for parameter in stage.box_head[1].parameters():
            nn.init.zeros_(parameter)


@torch.no_grad()
def enlarge_boxes(model: Sextant, side: int) -> None:
    """Fix the model's boxes at 20 % of an image's side or more: untrained ones are tiny."""
    nn.init.zeros_(model.box_head.weight)
    nn.init.constant_(model.box_head.bias, math.log(0.1 * side / 4))  # distances to the sides, in cells of 4 pixels


@torch.no_grad()
def draw_few(model: Sotr, size: tuple[int, int]) -> None:
    """Set the model's score threshold to that of the best `MOST_CELLS` cells of noise, whose logits it makes moderate."""
    images = ImageBatch(noise(1, size), torch.tensor([size]))
    bias = model.class_head.bias
    logits = model(images).layers[-1].class_logits - bias
    model.class_head.weight /= logits.std()  # untrained, they are so large that many scores are 1
    scores = point_nms((logits / logits.std() + bias).sigmoid(), model.config.grids).amax(2).flatten()
    threshold = scores.topk(min(MOST_CELLS + 1, len(scores))).values[-1].item()
    model.config = replace(model.config, score_threshold=threshold)


def deformable_detr(quick: bool) -> Any:
    """Return transformers' DeformableDetr with box refinement, which SOLQ has too."""
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection

    torch.manual_seed(0)
    small = {"encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64} if quick else {}
    backbone = {**timm_backbone(quick), "out_indices": [2, 3, 4]}
    settings: dict[str, Any] = {"num_labels": 91, "backbone_config": backbone, "with_box_refine": True, **small}
    return DeformableDetrForObjectDetection(DeformableDetrConfig(**settings)).eval()


def mask2former(quick: bool) -> Any:
    """Return transformers' Mask2Former."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation
    from transformers.utils import logging

    logging.set_verbosity_error()  # it warns of backbones other than Swin
    torch.manual_seed(0)
    small = {"encoder_layers": 1, "decoder_layers": 2, "encoder_feedforward_dim": 64, "dim_feedforward": 64} if quick else {}
    backbone = {**timm_backbone(quick), "out_indices": [1, 2, 3, 4]}
    settings: dict[str, Any] = {"num_labels": 80, "backbone_config": backbone, **small}
    return Mask2FormerForUniversalSegmentation(Mask2FormerConfig(**settings)).eval()


def timm_backbone(quick: bool) -> dict[str, Any]:
    """Return the setting of transformers for an untrained ResNet."""
    name = "resnet18" if quick else "resnet50"
    return {"model_type": "timm_backbone", "backbone": name, "features_only": True, "use_pretrained_backbone": False}


def mask_rcnn(quick: bool) -> Any:
    """Return torchvision's Mask R-CNN without resizing and without a score threshold."""
    from torchvision.models.detection import maskrcnn_resnet50_fpn

    torch.manual_seed(0)
    few = {"rpn_post_nms_top_n_test": 50, "box_detections_per_img": 10} if quick else {}
    model = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, box_score_thresh=0.0, **few).eval()
    model.transform = Listed()
    return model


class Listed(torch.nn.Module):
    """Mask R-CNN's first and last step, without resizing and normalizing: the pixels come normalized, and masks are pasted."""

    def forward(self, images: list[Tensor], targets: Any = None) -> tuple[Any, Any]:
        """Return the images in the format of the model."""
        from torchvision.models.detection.image_list import ImageList

        return ImageList(torch.stack(images), [(image.shape[1], image.shape[2]) for image in images]), targets

    def postprocess(self, found: list[dict[str, Tensor]], sizes: Any, original: Any) -> list[dict[str, Tensor]]:
        """Return masks at the size of the images; in training there are none."""
        from torchvision.models.detection.roi_heads import paste_masks_in_image

        for one, size in zip(found, original, strict=not self.training):
            one["masks"] = paste_masks_in_image(one["masks"], one["boxes"], size) >= 0.5
        return found


MODELS: dict[str, Callable[[bool], Any]] = {
    DDETR: deformable_detr,
    M2F: mask2former,
    MRCNN: mask_rcnn,
    **{f"maskset {name}": partial(system, name) for name in SYSTEMS},
    LIKE: partial(system, "solq", hidden_dim=256),
    SMALL: partial(system, "sextant", recipe="small"),
}


@torch.inference_mode()
def results(name: str, model: Any, pixels: Tensor, most: int = MOST, dtype: torch.dtype = torch.float32) -> list[Any]:
    """Return at most `most` results of a model in each image: boxes, or masks at the image's size."""
    sizes = [(pixels.shape[2], pixels.shape[3])] * len(pixels)
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        if isinstance(model, System):
            images = ImageBatch(pixels, torch.tensor(sizes, device=pixels.device))
            found = model.postprocess(model(images), images, sizes, most)
            return [one.to_coco() for one in found]
        if name == MRCNN:
            return model(list(pixels))
        output = model(pixels)
    if name == DDETR:
        from transformers import DeformableDetrImageProcessor as Processor

        return Processor().post_process_object_detection(output, 0.0, sizes, most)
    from transformers import Mask2FormerImageProcessor

    post = Mask2FormerImageProcessor().post_process_instance_segmentation
    with pixels.device:  # it creates tensors on the default device
        return [one["segmentation"] for one in post(output, 0.0, target_sizes=sizes, return_binary_maps=True)]


def counts(name: str, found: list[Any]) -> list[int]:
    """Return the number of masks in each image."""
    return [len(one["masks"]) if name == MRCNN else len(one) for one in found]


@torch.inference_mode()
def agree(report: Report, model: System, pixels: Tensor) -> None:
    """Check that SOLQ's outputs are the same with every implementation of attention."""
    images = ImageBatch(pixels, torch.tensor([pixels.shape[2:]] * len(pixels), device=pixels.device))
    outputs = {}
    usable = [name for name, reason in implementations().items() if reason is None]
    for name in (name for name in usable if FUSED.get(name, pixels.device.type) == pixels.device.type):
        with using(name):
            last = model(images).layers[-1]
            assert last.boxes is not None
            outputs[name] = torch.cat([last.class_logits, last.boxes], -1)
    for name, output in outputs.items():
        if name == "reference":
            continue
        apart = (output - outputs["reference"]).abs().max().item()
        report.agree(f"logits and boxes of SOLQ with {name} and reference attention", apart, 1e-3)


def memory(name: str, pixels: Tensor, quick: bool) -> tuple[float, float]:
    """Return the memory of this process before a model computes, and at most, MiB."""
    model = MODELS[name](quick)
    results(name, model, noise(1, (64, 64)))  # warm-up
    before, _ = resident()
    results(name, model, pixels)
    return before, resident()[1]


def add_targets(report: Report, place: str) -> None:
    """Add the targets of SOLQ."""
    for precision in PRECISIONS:
        case = f"{place}, {precision}"
        for baseline, least in ((DDETR, 2), (M2F, 2), (MRCNN, 1)):
            what = f"speed-up of SOLQ over {baseline}: inference, {precision}"
            report.target(what, least, report.speedup(case, "maskset solq", baseline))
    case = f"memory of a process, {place}, float32"
    for baseline in (DDETR, M2F, MRCNN):
        report.target(
            f"memory saving of SOLQ over {baseline}: inference", 1, report.memory_saving(case, "maskset solq", baseline)
        )
