"""Masks to the run-length text of COCO's files, and mask codecs, against the usual ways.

100 soft box masks of 128 x 128 pixels, pasted into boxes of 4 % of an image of 480 x 640 pixels on average, against torchvision's
paste and a grid_sample over the whole image (detectron2's rule, which is maskset's too); 100 probability maps at stride 4 against
interpolate; both then encoded by pycocotools. DCT codes of 128 x 128 pixels and 256 numbers against one dense matrix. Run lengths
of 100 whole masks against pycocotools.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from benchmarks.measure import in_turn
from benchmarks.report import Report
from maskset import rle
from maskset.instances import Masks
from maskset.masks.codecs.dct import DctCodec, dct_basis, zigzag
from maskset.masks.paint import paint_probabilities, paste_soft

SIDE, STRIDE, CODE = 128, 4, 256
PYCOCOTOOLS = "pycocotools"


@dataclass(frozen=True)
class Drawn:
    """Masks inside boxes, and what they are on whole images.

    Attributes:
        fields: values in (0, 1), as a network gives them.
        boxes: x0 y0 x1 y1, pixels.
        size: height and width of the image, pixels.
    """

    fields: Float[Tensor, "n S S"]
    boxes: Float[Tensor, "n 4"]
    size: tuple[int, int]


def run(report: Report, quick: bool) -> None:
    """Measure each step from a network's numbers to text."""
    drawn = made(10, (96, 128)) if quick else made(100, (480, 640))
    seconds = 0 if quick else 12
    box_masks(report, drawn, seconds)
    full_image_masks(report, drawn, seconds)
    codes(report, drawn, seconds)
    run_lengths(report, drawn, seconds)


def made(count: int, size: tuple[int, int]) -> Drawn:
    """Return blobs with wavy borders, in boxes of 4 % of the image on average, of many sizes and shapes."""
    generator = torch.Generator().manual_seed(0)
    axis = (torch.arange(SIDE) + 0.5) / SIDE * 2 - 1
    waves = F.interpolate(torch.randn(count, 1, 6, 6, generator=generator), size=(SIDE, SIDE), mode="bicubic")[:, 0]
    fields = (8 * (1 - torch.hypot(axis[:, None], axis[None]) + 0.3 * waves)).sigmoid()
    height, width = size
    shares = torch.randn(count, generator=generator).exp()
    areas = 0.04 * height * width * shares / shares.mean()
    ratio = (0.4 * torch.randn(count, generator=generator)).exp()
    sides = torch.stack([(areas * ratio).sqrt().clamp(4, width - 2), (areas / ratio).sqrt().clamp(4, height - 2)], 1)
    corners = torch.rand(count, 2, generator=generator) * (torch.tensor([width, height]) - sides)
    return Drawn(fields, torch.cat([corners, corners + sides], 1), size)


def box_masks(report: Report, drawn: Drawn, seconds: float) -> None:
    """From masks inside boxes to text."""
    case, baseline = f"{len(drawn.fields)} box masks to text", f"torchvision's paste, {PYCOCOTOOLS}"
    sampled = "grid_sample over the image, " + PYCOCOTOOLS
    found = Masks.from_rle(pasted(drawn), drawn.size).dense()
    report.agree(
        "pasted masks and grid_sample over the whole image, share of all pixels", apart(found, sampled_masks(drawn)), 1e-6
    )
    rounded = apart(found, torchvision_masks(drawn))
    report.note(f"torchvision moves boxes to whole pixels: {100 * rounded:.3f} % of all pixels are others.")
    implementations = {
        baseline: lambda: coco_text(torchvision_masks(drawn)),
        sampled: lambda: coco_text(sampled_masks(drawn)),
        "maskset": partial(pasted, drawn),
    }
    report.compare(case, baseline, in_turn(implementations, seconds))
    report.target(f"speed-up over torchvision and {PYCOCOTOOLS}: {case}", 10, report.speedup(case, "maskset"))


def pasted(drawn: Drawn) -> list[str]:
    """Return the text of maskset's masks."""
    return texts(paste_soft(drawn.fields, drawn.boxes, drawn.size, 0.5))


def texts(masks: Masks) -> list[str]:
    """Return the text of each mask."""
    return rle.to_strings(masks.rle(), masks.size)


def torchvision_masks(drawn: Drawn) -> Bool[Tensor, "n h w"]:
    """Return what Mask R-CNN's post-processing pastes."""
    return paste_masks_in_image(drawn.fields[:, None], drawn.boxes, drawn.size)[:, 0] >= 0.5


def sampled_masks(drawn: Drawn) -> Bool[Tensor, "n h w"]:
    """Return the masks sampled at the center of every pixel of the image, as detectron2 does it on a GPU."""
    (height, width), (x0, y0, x1, y1) = drawn.size, drawn.boxes.unbind(1)
    x = ((torch.arange(width) + 0.5)[None] - x0[:, None]) / (x1 - x0)[:, None] * 2 - 1
    y = ((torch.arange(height) + 0.5)[None] - y0[:, None]) / (y1 - y0)[:, None] * 2 - 1
    grid = torch.stack([x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], -1)
    return F.grid_sample(drawn.fields[:, None], grid, align_corners=False)[:, 0] >= 0.5


def full_image_masks(report: Report, drawn: Drawn, seconds: float) -> None:
    """From maps at stride 4 to text."""
    small = (drawn.size[0] // STRIDE, drawn.size[1] // STRIDE)
    shrunk = Drawn(drawn.fields, drawn.boxes / STRIDE, small)
    maps = paste_probabilities(shrunk)
    case, baseline = f"{len(maps)} maps at stride {STRIDE} to text", f"interpolate, {PYCOCOTOOLS}"

    def interpolated() -> Bool[Tensor, "n h w"]:
        return F.interpolate(maps[:, None], scale_factor=STRIDE, mode="bilinear", align_corners=False)[:, 0] > 0.5

    def painted() -> list[str]:
        return texts(paint_probabilities(maps, STRIDE, drawn.size, drawn.size))

    found = Masks.from_rle(painted(), drawn.size).dense()
    report.agree("painted masks and interpolate, share of all pixels", apart(found, interpolated()), 1e-6)
    report.compare(case, baseline, in_turn({baseline: lambda: coco_text(interpolated()), "maskset": painted}, seconds))
    report.target(f"speed-up over interpolate and {PYCOCOTOOLS}: {case}", 5, report.speedup(case, "maskset"))


def paste_probabilities(drawn: Drawn) -> Float[Tensor, "n h w"]:
    """Return the fields on maps of the whole image."""
    return paste_masks_in_image(drawn.fields[:, None], drawn.boxes, drawn.size)[:, 0]


def codes(report: Report, drawn: Drawn, seconds: float) -> None:
    """From masks to DCT codes, and back."""
    codec, masks = DctCodec(SIDE, CODE), (drawn.fields >= 0.5).float()
    basis = dct_basis(SIDE).float()
    matrix = torch.kron(basis, basis)[zigzag(SIDE)[:CODE]]  # [D, S * S]
    kept = codec.encode(masks)
    report.agree("DCT codes and those of the dense matrix", (kept - masks.flatten(1) @ matrix.T).abs().max().item(), 1e-3)
    report.agree("masks of DCT codes", (codec.decode(kept).flatten(1) - kept @ matrix).abs().max().item(), 1e-4)
    both = {
        "encode": {"dense matrix": lambda: masks.flatten(1) @ matrix.T, "maskset, separable": lambda: codec.encode(masks)},
        "decode": {
            "dense matrix": lambda: (kept @ matrix).view(-1, SIDE, SIDE),
            "maskset, separable": lambda: codec.decode(kept),
        },
    }
    for what, implementations in both.items():
        case = f"DCT {what}, {len(masks)} masks"
        report.compare(case, "dense matrix", in_turn(implementations, seconds / 4))
        report.target(f"speed-up over a dense matrix: {case}", 5, report.speedup(case, "maskset, separable"))


def run_lengths(report: Report, drawn: Drawn, seconds: float) -> None:
    """From dense masks to text, and back."""
    dense = sampled_masks(drawn)
    text = coco_text(dense)
    report.agree("texts of dense masks that differ", sum(a != b for a, b in zip(encoded(dense), text, strict=True)), 0)
    report.agree("texts that are other masks when read", int((decoded(text, drawn.size) != dense).sum()), 0)
    for what, theirs, ours in (
        ("encode", partial(coco_text, dense), partial(encoded, dense)),
        ("decode", partial(coco_dense, text, drawn.size), partial(decoded, text, drawn.size)),
    ):
        times = in_turn({PYCOCOTOOLS: theirs, "maskset": ours}, seconds / 4)
        report.compare(f"run lengths, {what} {len(dense)} masks", PYCOCOTOOLS, times)


def encoded(dense: Bool[Tensor, "n h w"]) -> list[str]:
    """Return maskset's text of each mask."""
    return texts(Masks.from_dense(dense))


def decoded(text: Sequence[str], size: tuple[int, int]) -> Bool[Tensor, "n h w"]:
    """Return maskset's masks of each text."""
    return Masks.from_rle(text, size).dense()


def coco_text(dense: Bool[Tensor, "n h w"]) -> list[str]:
    """Return pycocotools' text of each mask."""
    rows: Any = coco_mask.encode(np.asfortranarray(dense.permute(1, 2, 0).numpy().view(np.uint8)))
    return [row["counts"].decode() for row in rows]


def coco_dense(text: Sequence[str], size: tuple[int, int]) -> np.ndarray:
    """Return pycocotools' masks of each text, [h w n]."""
    rows: Any = [{"size": list(size), "counts": one.encode()} for one in text]
    return coco_mask.decode(rows)


def apart(masks: Bool[Tensor, "n h w"], others: Bool[Tensor, "n h w"]) -> float:
    """Return the share of pixels in which masks differ."""
    return (masks != others).float().mean().item()
