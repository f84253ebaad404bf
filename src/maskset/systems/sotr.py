"""SOTR: Segmenting Objects with Transformers (Guo, Niu, Qu, Li, ICCV 2021, arXiv:2108.06747).

Each cell of five grids predicts a class and a kernel of 256 numbers for the object whose center falls into it. All masks of an
image are drawn on one map of mask features, each by the 1x1 convolution with its kernel. There are no queries, no boxes and no
matching: an object is assigned to the cells around its center, on the grids for its size, and Matrix NMS suppresses duplicates.
SOTR is SOLOv2 with a transformer in place of its convolutional towers. From top to bottom this file follows figure 2: backbone,
transformer, functional heads, multi-level upsampling, then targets, loss and results.

The transformer of the paper differs from that of the released code, to which the published weights belong: the default,
`transformer="released"`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from maskset import distributed
from maskset.config import NonNegativeFloat, NonNegativeInt, PositiveInt, Probability, config, setting
from maskset.errors import ConfigError
from maskset.instances import Category, Instances, Masks
from maskset.layers.backbone import FeaturePyramid
from maskset.layers.twin import PaperTransformer, ReleasedTransformer
from maskset.losses import chunked_loss, focal_loss, squared_dice_loss
from maskset.masks.heads.features import MaskFeatureHead, dynamic_conv
from maskset.masks.nms import greedy_nms, mask_iou, matrix_nms
from maskset.masks.paint import paint_probabilities
from maskset.masks.targets import centers_of_mass, downsample_by_4_opencv
from maskset.structures import ImageBatch, ModelOutput, SlotPredictions
from maskset.systems.base import BackboneConfig, InputConfig, System, SystemConfig, check_canvas, check_divisor, check_heads

_LEVELS = 5
_CANVAS = 32  # pixels; on multiples of it each pyramid level is exactly twice as large as the next
_STRIDE = 4  # pixels per cell of the mask features
_MIN_AREAS = (8, 8, 16, 32, 32)  # a mask of each grid must cover more cells of the mask features than this: the level's stride
_MAX_CELLS = 2**22  # cells of the masks that are in memory at a time
_MASK_THRESHOLD = 0.5  # probability above which a cell belongs to a mask
_GREEDY_IOU = 0.5  # IoU above which greedy NMS drops a mask
_INPUT = InputConfig(  # the normalization of MSRA's weights, and the image size of the official tests
    mean=(103.53 / 255, 116.28 / 255, 123.675 / 255),
    std=(1 / 255, 1 / 255, 1 / 255),
    channel_order="bgr",
    divisor=_CANVAS,
    short_side=1000,
)


@config
class SotrConfig(SystemConfig):
    """Settings of SOTR; the defaults are those of the official ResNet-50 model."""

    system: Literal["sotr"] = "sotr"
    input: InputConfig = setting(_INPUT, "how images become the network's input")
    backbone: BackboneConfig = setting(BackboneConfig(stride_in_first=True, drop_path=0.0), "the backbone")
    hidden_dim: PositiveInt = setting(256, "width C of pyramid and transformer")
    num_heads: PositiveInt = setting(8, "attention heads")
    transformer: Literal["released", "pure-twin", "hybrid-twin", "full"] = setting(
        "released", "variant of the transformer: the released code's, or one of table 2"
    )
    depth: NonNegativeInt = setting(12, "layers of the transformer (table 3)")
    substituted: Literal["none", "p5", "p4+p5"] = setting(
        "p5", "pyramid levels that the transformer processes before they enter the mask features (table 4)"
    )
    grids: tuple[PositiveInt, ...] = setting((40, 36, 24, 16, 12), "cells along each side of the five grids")
    scale_from: tuple[PositiveInt, ...] = setting(
        (1, 48, 96, 192, 384), "smallest object of each grid: square root of the box area, pixels"
    )
    scale_to: tuple[PositiveInt, ...] = setting(
        (96, 192, 384, 768, 2048), "largest object of each grid: square root of the box area, pixels"
    )
    center_fraction: Probability = setting(
        0.2, "size of the region around the center of mass whose cells are assigned, relative to the box"
    )
    mask_hidden_dim: PositiveInt = setting(128, "width inside the multi-level upsampling")
    mask_dim: PositiveInt = setting(256, "D, width of the mask features and length of a kernel")
    mask_weight: NonNegativeFloat = setting(3.0, "weight of the dice loss")
    class_weight: NonNegativeFloat = setting(1.0, "weight of the focal loss")
    score_threshold: Probability = setting(0.1, "minimum class probability of a candidate")
    nms: Literal["gaussian", "linear", "greedy"] = setting(
        "gaussian", "Matrix NMS with this decay, or greedy suppression of masks"
    )
    nms_candidates: PositiveInt = setting(500, "number of best masks that enter NMS: the maximum number of detections per image")
    final_score_threshold: Probability = setting(0.05, "minimum score of a detection after Matrix NMS")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self, "hidden_dim", "num_heads")
        for name in ("grids", "scale_from", "scale_to"):
            if len(getattr(self, name)) != _LEVELS:
                raise ConfigError(f"model.{name} must be {_LEVELS} numbers, got {getattr(self, name)}.")
        if any(low > high for low, high in zip(self.scale_from, self.scale_to, strict=True)):
            raise ConfigError(f"model.scale_from must not exceed scale_to ({self.scale_to}), got {self.scale_from}.")
        if any(low > high for low, high in zip(sorted(self.scale_from)[1:], sorted(self.scale_to), strict=False)):
            raise ConfigError(
                "model.scale_from and scale_to leave a gap, so that objects of some sizes would be on no grid: got "
                f"{self.scale_from} and {self.scale_to}."
            )
        check_divisor(self, _CANVAS)
        hub = self.backbone.pretrained and not self.backbone.stride_in_first and self.backbone.weights is None
        if hub and max(self.input.std) < 0.02:
            raise ConfigError(
                "model.backbone.stride_in_first false starts from timm's hub, whose weights need model.input.mean "
                f"0.485 0.456 0.406, std 0.229 0.224 0.225 and channel_order rgb; got std {self.input.std}."
            )

    def build(self, categories: tuple[Category, ...]) -> "Sotr":
        """Return an untrained SOTR."""
        return Sotr(self, categories)


class Sotr(System):
    """The network of figure 2. See `SotrConfig` for its parts."""

    config: SotrConfig

    def __init__(self, config: SotrConfig, categories: tuple[Category, ...]) -> None:
        super().__init__(config, categories, num_slots=sum(side**2 for side in config.grids))
        width = config.hidden_dim
        # Backbone: C2 ... C5 become P2 ... P5
        self.backbone = config.backbone.build(finest=4)
        self.pyramid = FeaturePyramid(self.backbone.channels, width)
        # Transformer and functional heads: the same for all grids
        if config.transformer == "released":
            self.transformer = ReleasedTransformer(width, config.num_heads, config.depth)
        else:
            self.transformer = PaperTransformer(config.transformer, width, config.num_heads, config.depth, config.grids[0])
        self.class_head = nn.Linear(width, config.num_classes)
        self.kernel_head = nn.Linear(width, config.mask_dim)
        # Multi-level upsampling, of P2 ... P5
        self.mask_feature_head = MaskFeatureHead([width] * 4, [0, 1, 2, 3], config.mask_hidden_dim, config.mask_dim)
        nn.init.constant_(self.class_head.bias, -math.log(99))  # every class starts at a probability of 0.01

    def forward(self, images: ImageBatch) -> ModelOutput:
        """Return class logits [B N K] and kernels [B N D] of all cells, grid by grid, row by row, and mask features [B D h w]."""
        check_canvas(images, self.input.divisor)
        levels = self.pyramid(self.backbone(images.pixels))  # P2 ... P5, strides 4, 8, 16, 32; each [B C h w]
        cells = []
        for level, side in zip(self._levels(levels), self.config.grids, strict=True):
            grid = F.interpolate(level, size=(side, side), mode="bilinear")  # the aspect ratio is not kept
            cells.append(self.transformer(grid).flatten(2))
        slots = torch.cat(cells, 2).transpose(1, 2)  # [B N C]
        predictions = SlotPredictions(self.class_head(slots), self.kernel_head(slots))
        return ModelOutput([predictions], mask_features=self._mask_features(levels))

    def _levels(self, levels: Sequence[Float[Tensor, "B C _ _"]]) -> list[Float[Tensor, "B C _ _"]]:
        """Return the maps that are resized to the five grids: P2 at half its size, P3, P4, P5, and P6 at the size of P5."""
        p2, p3, p4, p5 = levels
        p6 = F.max_pool2d(p5, 1, stride=2)
        half_p2 = F.interpolate(p2, scale_factor=0.5, mode="bilinear")
        return [half_p2, p3, p4, p5, F.interpolate(p6, size=(p5.shape[2], p5.shape[3]), mode="bilinear")]

    def _mask_features(self, levels: Sequence[Float[Tensor, "B C _ _"]]) -> Float[Tensor, "B D h w"]:
        """Return the mask features at stride 4, none of them negative, from P2 ... P5; the transformer processes the coarsest.

        The paper upsamples the mask features to the size of the image; the official code upsamples only the masks.
        """
        first = {"none": 4, "p5": 3, "p4+p5": 2}[self.config.substituted]  # index of the first level for the transformer
        return self.mask_feature_head([*levels[:first], *(self.transformer(level) for level in levels[first:])])

    def loss(self, output: ModelOutput, images: ImageBatch, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Return two terms: class (focal, divided by the number of assigned cells + 1) and mask (dice, the mean over all pairs).

        Only the masks of assigned cells are drawn, a few at a time, on the whole canvas with its padding. Without any pair
        the mask term is 0; the official code fails. Computed in float32.
        """
        with torch.autocast(images.pixels.device.type, enabled=False):
            # Rasterize polygons once: targets and mask losses both read run lengths.
            targets = [replace(instances, masks=Masks(instances.masks.rle(), instances.masks.size)) for instances in targets]
            return self._terms(output, targets)

    def _terms(self, output: ModelOutput, targets: Sequence[Instances]) -> dict[str, Tensor]:
        (layer,) = output.layers
        assert layer.mask_params is not None
        assert output.mask_features is not None
        logits, kernels, features = layer.class_logits.float(), layer.mask_params.float(), output.mask_features.float()
        pairs = [assign(instances, (features.shape[2], features.shape[3]), self.config) for instances in targets]
        class_targets, positive = torch.zeros_like(logits), 0
        for expected, image_pairs, instances in zip(class_targets, pairs, targets, strict=True):
            objects = image_pairs.object_of_slot(len(expected))
            cells = (objects >= 0).nonzero()[:, 0]
            expected[cells, instances.labels.cpu()[objects[cells]]] = 1
            positive += len(cells)
        # Divisors, counted over all processes: (cells + 1) / processes, and pairs / processes
        cell_count = distributed.divisor(positive + 1 / distributed.world_size(), like=logits)
        pair_count = distributed.divisor(sum(len(image_pairs.cells) for image_pairs in pairs), like=logits)
        return {
            "class": self.config.class_weight * focal_loss(logits, class_targets).sum() / cell_count,
            "mask": self.config.mask_weight * _mask_loss(kernels, features, pairs, targets) / pair_count,
        }

    @torch.no_grad()
    def postprocess(
        self,
        output: ModelOutput,
        images: ImageBatch,
        sizes: Sequence[tuple[int, int]],
        limit: int = 100,
        threshold: float = 0.0,
    ) -> list[Instances]:
        """Return the best masks of each image after NMS; a cell may appear with several classes.

        Boxes are the bounding boxes of the masks; the official code returns boxes of zeros.
        """
        (layer,) = output.layers
        assert layer.mask_params is not None
        assert output.mask_features is not None
        detections = []
        with torch.autocast(images.pixels.device.type, enabled=False):  # rounding would move the masks' edges
            scores = point_nms(layer.class_logits.float().sigmoid(), self.config.grids)
            each_image = zip(
                scores, layer.mask_params.float(), output.mask_features.float(), images.sizes.tolist(), sizes, strict=True
            )
            for image_scores, kernels, features, input_size, size in each_image:
                candidates = self._candidates(image_scores.nan_to_num(0), kernels, features, self.config.nms_candidates)
                best = self._suppress(candidates)
                best = best[best.scores >= threshold][:limit]
                cells, mask_of = best.cells.unique(return_inverse=True)  # paint a cell once, however many classes it has
                drawn = dynamic_conv(features, kernels[cells]).sigmoid()
                masks = paint_probabilities(drawn, _STRIDE, input_size, size)[mask_of.tolist()]
                detections.append(Instances(best.labels.cpu(), masks.boxes(), masks, best.scores.cpu(), self.categories))
        return detections

    def _candidates(
        self, scores: Float[Tensor, "N K"], kernels: Float[Tensor, "N D"], features: Float[Tensor, "D h w"], count: int
    ) -> "Candidates":
        """Return the `count` best pairs of cell and class, by class probability times the mean probability inside the mask.

        Masks are drawn in chunks, in the order of the cells' best class probabilities. Since the mean is at most 1, no later
        mask can be among the best once `count` pairs exceed the next class probability; drawing stops there.
        """
        scores = scores * (scores > self.config.score_threshold)
        class_scores, cells = scores.amax(1).sort(descending=True, stable=True)
        sides = torch.tensor(self.config.grids, device=scores.device)
        min_areas = torch.tensor(_MIN_AREAS, device=scores.device).repeat_interleave(sides**2)
        mask_scores, masks = torch.zeros_like(scores), [features[:0] > 0]
        for chunk in cells[class_scores > 0].split(max(1, _MAX_CELLS // features[0].numel())):
            if len(chunk) == 0 or int((mask_scores > scores[chunk[0]].max()).sum()) >= count:
                break
            drawn = dynamic_conv(features, kernels[chunk]).sigmoid()
            masks.append(drawn > _MASK_THRESHOLD)
            areas = masks[-1].sum((1, 2))
            confidence = (drawn * masks[-1]).sum((1, 2)) / areas.clamp(min=1) * (areas > min_areas[chunk])
            mask_scores[chunk] = scores[chunk] * confidence[:, None]
        best, pairs = mask_scores.flatten().sort(descending=True, stable=True)
        best, pairs = best[best > 0][:count], pairs[best > 0][:count]
        slots, labels = pairs // scores.shape[1], pairs % scores.shape[1]
        return Candidates(slots, labels, best, torch.cat(masks)[cells.argsort()[slots]])

    def _suppress(self, candidates: "Candidates") -> "Candidates":
        """Return the candidates that NMS keeps, best first."""
        iou = mask_iou(candidates.masks)
        if self.config.nms == "greedy":
            return candidates[greedy_nms(iou, candidates.labels, _GREEDY_IOU)]
        scores = candidates.scores * matrix_nms(iou, candidates.labels, self.config.nms)
        order = scores.argsort(descending=True, stable=True)
        order = order[scores[order] >= self.config.final_score_threshold]
        return replace(candidates, scores=scores)[order]


@dataclass(frozen=True)
class Candidates:
    """Pairs of cell and class of one image, and their masks at the size of the mask features."""

    cells: Int[Tensor, "n"]
    labels: Int[Tensor, "n"]
    scores: Float[Tensor, "n"]
    masks: Bool[Tensor, "n h w"]

    def __getitem__(self, index: Int[Tensor, "_"] | Bool[Tensor, "_"] | slice) -> "Candidates":
        """Return the candidates at the given positions."""
        return Candidates(self.cells[index], self.labels[index], self.scores[index], self.masks[index])


def point_nms(scores: Float[Tensor, "B N K"], grids: Sequence[int]) -> Float[Tensor, "B N K"]:
    """Return the scores, with 0 where the cell above, to the left or to the upper left has a higher score of the same class."""
    maxima = []
    for grid, side in zip(scores.split([side**2 for side in grids], 1), grids, strict=True):
        square = grid.transpose(1, 2).unflatten(2, (side, side))
        best = F.max_pool2d(square, 2, stride=1, padding=1)[:, :, :-1, :-1]
        maxima.append((square * (square == best)).flatten(2).transpose(1, 2))
    return torch.cat(maxima, 1)


@dataclass(frozen=True)
class Pairs:
    """Pairs of cell and object of one image, in the order of grids, then objects; a cell may occur with several objects."""

    cells: Int[Tensor, "P"]
    objects: Int[Tensor, "P"]

    def object_of_slot(self, slots: int) -> Int[Tensor, "N"]:
        """Return the object whose class each of `slots` slots should predict: its last object, or -1 if it has none."""
        return torch.full((slots,), -1).scatter_reduce(0, self.cells, self.objects, "amax")


def assign(targets: Instances, size: tuple[int, int], settings: SotrConfig) -> Pairs:
    """Return the pairs of cell and object of one image, on the CPU.

    An object is assigned on every grid for its size, to the cells that a region around its center of mass touches. The region
    has `center_fraction` of the box's height and width; at most the cell of the center and its eight neighbors are assigned.

    Args:
        targets: objects of one image, boxes in pixels; an object with an empty mask is assigned to no cell.
        size: height and width of the mask features; the grids cover the whole canvas.
        settings: the grids, the object sizes of each, and the size of the region.
    """
    boxes = targets.boxes.cpu()
    areas, centers = centers_of_mass(targets.masks)  # y, x; in float32 as officially: a center may lie on a border of cells
    sides = (boxes[:, 2:] - boxes[:, :2]).flip(1)  # height, width
    scales, reach = sides.prod(1).sqrt(), 0.5 * sides * settings.center_fraction
    cells, objects, offset = [], [], 0
    for side, low, high in zip(settings.grids, settings.scale_from, settings.scale_to, strict=True):
        on_grid = ((scales >= low) & (scales <= high) & (areas > 0)).nonzero()[:, 0]
        (rows, in_rows), (columns, in_columns) = (
            _cells_around(centers[on_grid, axis], reach[on_grid, axis], _STRIDE * size[axis], side) for axis in (0, 1)
        )
        inside = in_rows[:, :, None] & in_columns[:, None]
        cells.append((offset + side * rows[:, :, None] + columns[:, None])[inside])
        objects.append(on_grid[:, None, None].expand(inside.shape)[inside])
        offset += side**2
    return Pairs(torch.cat(cells), torch.cat(objects))


def _cells_around(
    centers: Float[Tensor, "n"], reach: Float[Tensor, "n"], length: int, side: int
) -> tuple[Int[Tensor, "n 3"], Bool[Tensor, "n 3"]]:
    """Return, along one axis, the indices of up to three cells for each object, and which of the three are assigned.

    Args:
        centers: centers of mass, pixels.
        reach: half the size of the region, pixels.
        length: size of the canvas, pixels.
        side: number of cells.
    """

    def cell(position: Float[Tensor, "n"]) -> Int[Tensor, "n"]:
        return (position / length // (1 / side)).long()

    middle = cell(centers)
    first = torch.maximum(cell(centers - reach).clamp(min=0), middle - 1)
    last = torch.minimum(cell(centers + reach).clamp(max=side - 1), middle + 1)
    index = first[:, None] + torch.arange(3)
    return index, index <= last[:, None]


def _mask_loss(
    kernels: Float[Tensor, "B N D"], features: Float[Tensor, "B D h w"], pairs: Sequence[Pairs], targets: Sequence[Instances]
) -> Float[Tensor, ""]:
    """Return the sum of the dice losses of all pairs, in the memory of a few masks."""
    chunk_size, device = max(1, _MAX_CELLS // features[0, 0].numel()), features.device
    chunks, expected = [], []
    for i, (image_pairs, instances) in enumerate(zip(pairs, targets, strict=True)):
        objects, mask_of = image_pairs.objects.unique(return_inverse=True)
        masks = downsample_by_4_opencv(instances.masks[objects], (features.shape[2], features.shape[3])).to(device)
        chunks += kernels[i, image_pairs.cells.to(device)].split(chunk_size)
        expected += [(i, masks, index) for index in mask_of.to(device).split(chunk_size)]

    def compute_losses(chunk: int, kernels: Float[Tensor, "n D"], features: Float[Tensor, "B D h w"]) -> Float[Tensor, "1"]:
        image, masks, index = expected[chunk]
        drawn = dynamic_conv(features[image], kernels).sigmoid()
        return squared_dice_loss(drawn, masks[index].float(), eps=0.002).sum()[None]

    return chunked_loss(compute_losses, chunks, features).sum()
