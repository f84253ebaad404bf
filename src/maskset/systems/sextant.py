"""Sextant: maskset's own system, made to learn quickly from little data (docs/systems/sextant.md).

Every cell of a feature pyramid may report an object, as in SOTR. It holds one vector that says class, box and mask, as in SOLQ.
In training, many cells learn from each object. A second class head learns from one cell per object; the cells that it scores
highest become queries, and only queries report. A penalty suppresses the duplicates among them, so that there is no NMS. A
mask is drawn inside its box, at the resolution of the object (ISTR), by a small network whose weights come from the vector and
which knows its position relative to the box (SOIT, ISDA). From top to bottom: backbone and pyramid, cells, queries, masks, then
losses and results.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torchvision.ops import roi_align

from maskset import boxes as box_ops
from maskset import distributed
from maskset.assignment import Assignment, assign, overlap
from maskset.config import NonNegativeFloat, NonNegativeInt, PositiveInt, Probability, config, setting
from maskset.detection import pad
from maskset.errors import ConfigError
from maskset.instances import Category, Instances
from maskset.layers.backbone import FeaturePyramid, group_count
from maskset.layers.blocks import cell_grid
from maskset.losses import squared_dice_loss, varifocal_loss
from maskset.masks.heads.features import ConvBlock
from maskset.masks.paint import paste_soft
from maskset.masks.targets import crop
from maskset.structures import ImageBatch, ModelOutput, SlotPredictions
from maskset.systems.base import BackboneConfig, InputConfig, System, SystemConfig, check_canvas, check_divisor

_CANVAS = 32  # pixels; on multiples of it each pyramid level is exactly twice as large as the next
_STRIDES = 4, 8, 16, 32  # pixels per cell of the pyramid levels
_MASK_STRIDE = 2  # pixels per cell of the mask features
_OUTSIDE = -20.0  # class logit of a cell on the padding
_MASK_THRESHOLD = 0.5  # probability from which on a pixel belongs to a mask


@config
class SextantConfig(SystemConfig):
    """Settings of Sextant; the defaults are those of the recipe sextant-small, but for backbone and input."""

    system: Literal["sextant"] = "sextant"
    input: InputConfig = setting(InputConfig(divisor=_CANVAS), "how images become the network's input")
    backbone: BackboneConfig = setting(BackboneConfig(), "the backbone")
    hidden_dim: PositiveInt = setting(64, "C, width of the pyramid and length of a cell's vector")
    head_layers: NonNegativeInt = setting(2, "convolutions between the pyramid and the cells' vectors")
    num_queries: PositiveInt = setting(300, "N, cells that become queries: the maximum number of objects per image")
    duplicate_penalty: NonNegativeFloat = setting(3.0, "what a query's logits lose if it covers a better query of its class")
    mask_dim: PositiveInt = setting(16, "width of the mask features")
    mask_hidden_dim: PositiveInt = setting(8, "hidden width of the network that draws a mask")
    mask_size: PositiveInt = setting(20, "S, samples along each side of a mask")
    box_margin: NonNegativeFloat = setting(0.25, "how much larger than its box the region of a mask is, as a fraction of the box")
    positives: PositiveInt = setting(8, "cells that learn from one object")
    dense_powers: tuple[NonNegativeFloat, NonNegativeFloat] = setting(
        (0.5, 4.0), "exponents of class probability and IoU in the one-to-many assignment"
    )
    unique_powers: tuple[NonNegativeFloat, NonNegativeFloat] = setting((1.0, 2.0), "the same in the one-to-one assignments")
    min_target: Probability = setting(0.3, "minimum class target of an assigned cell; above it, the target is the IoU")
    mask_positives: PositiveInt = setting(2, "cells whose masks learn from one object, at most `positives`")
    class_weight: NonNegativeFloat = setting(1.0, "weight of the varifocal loss of each class head")
    l1_weight: NonNegativeFloat = setting(1.0, "weight of the box loss, relative to the size of the object")
    giou_weight: NonNegativeFloat = setting(2.0, "weight of the generalized IoU loss")
    mask_weight: NonNegativeFloat = setting(2.0, "weight of the cross-entropy of masks")
    dice_weight: NonNegativeFloat = setting(2.0, "weight of the dice loss of masks")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_divisor(self, _CANVAS)
        if self.mask_positives > self.positives:
            raise ConfigError(f"model.mask_positives must be at most positives ({self.positives}), got {self.mask_positives}.")

    def build(self, categories: tuple[Category, ...]) -> "Sextant":
        """Return an untrained Sextant."""
        return Sextant(self, categories)


class Sextant(System):
    """The network. See `SextantConfig` for its parts.

    `ModelOutput.layers` are the cells with the one-to-many class logits, the same cells with the one-to-one class logits, and the
    queries. `mask_params` is the vector of a cell, from which `draw_masks` computes its mask.
    """

    CLASS_PARTS = ("dense_head", "unique_head")

    config: SextantConfig

    def __init__(self, config: SextantConfig, categories: tuple[Category, ...]) -> None:
        super().__init__(config, categories, num_slots=config.num_queries)
        width = config.hidden_dim
        # Backbone: C1 (stride 2), and C2 ... C5, which become P2 ... P5
        self.backbone = config.backbone.build(finest=2)
        first, *channels = self.backbone.channels
        self.pyramid = FeaturePyramid(channels, width)
        self.level_norms = nn.ModuleList(nn.GroupNorm(group_count(width), width) for _ in channels)
        # Cells: the same heads for all levels
        self.tower = nn.Sequential(*(ConvBlock(width, width, 3) for _ in range(config.head_layers)))
        self.dense_head = nn.Linear(width, config.num_classes)
        self.box_head = nn.Linear(width, 4)
        self.unique_tower = ConvBlock(width, width, 3)  # sees the neighbors, of which only one may report an object
        self.unique_head = nn.Linear(width, config.num_classes)
        # Masks
        self.fine_projection = nn.Conv2d(first, config.mask_dim, 1)
        self.coarse_projection = nn.Conv2d(width, config.mask_dim, 1)
        self.mask_block = ConvBlock(config.mask_dim, config.mask_dim, 3)
        self.mask_output = nn.Conv2d(config.mask_dim, config.mask_dim, 3, padding=1)
        self.kernel_head = nn.Linear(width, sum(self._kernel_sizes()))
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        for head in (self.dense_head, self.unique_head):
            nn.init.normal_(head.weight, std=0.01)
            nn.init.constant_(head.bias, -math.log(99))  # every class starts at a probability of 0.01
        nn.init.normal_(self.box_head.weight, std=0.01)
        nn.init.constant_(self.box_head.bias, math.log(1.5))  # a box of three cells around the center of its cell
        # At first all masks are drawn by the same network, which learns as any other; the vectors then change its weights.
        nn.init.normal_(self.kernel_head.weight, std=0.01)
        weights, biases, output, output_bias = self.kernel_head.bias.detach().split(self._kernel_sizes())
        weights.normal_(0, math.sqrt(2 / (self.config.mask_dim + 2)))
        output.normal_(0, math.sqrt(1 / self.config.mask_hidden_dim))
        biases.zero_()
        output_bias.zero_()

    def _kernel_sizes(self) -> list[int]:
        """Return how many numbers of a kernel are weights and biases of the hidden layer, and weights and bias of the output."""
        hidden = self.config.mask_hidden_dim
        return [hidden * (self.config.mask_dim + 2), hidden, hidden, 1]

    def forward(self, images: ImageBatch) -> ModelOutput:
        """Return the cells with both kinds of class logits, the queries, and the mask features [B D H/2 W/2]."""
        check_canvas(images, self.input.divisor)
        first, *maps = self.backbone(images.pixels)
        levels = self.pyramid(maps)  # P2 ... P5, strides 4, 8, 16, 32; each [B C h w]
        levels = [norm(level).relu() for norm, level in zip(self.level_norms, levels, strict=True)]
        fine = self.fine_projection(first)
        coarse = F.interpolate(self.coarse_projection(levels[0]), scale_factor=2, mode="bilinear")
        mask_features = self.mask_output(self.mask_block(fine + coarse))
        dense, unique = self._cells(levels, images)
        return ModelOutput([dense, unique, self._queries(dense, unique)], mask_features=mask_features)

    def _cells(self, levels: Sequence[Float[Tensor, "B C _ _"]], images: ImageBatch) -> tuple[SlotPredictions, SlotPredictions]:
        """Return the cells of all levels, level by level, row by row, with the logits of each class head."""
        vectors, neighbors, boxes, outside = [], [], [], []
        for stride, level in zip(_STRIDES, levels, strict=True):
            size = (level.shape[2], level.shape[3])
            features = self.tower(level)
            vectors.append(features.permute(0, 2, 3, 1).flatten(1, 2))
            neighbors.append(self.unique_tower(features).permute(0, 2, 3, 1).flatten(1, 2))
            boxes.append(self._boxes(vectors[-1], size, stride) / _scale(images))
            outside.append(images.padding(size).flatten(1))
        vector, padding = torch.cat(vectors, 1), torch.cat(outside, 1)[..., None]
        box = torch.cat(boxes, 1).masked_fill(padding, 0)  # an empty box overlaps nothing
        dense_logits = self.dense_head(vector).masked_fill(padding, _OUTSIDE)
        unique_logits = self.unique_head(torch.cat(neighbors, 1)).masked_fill(padding, _OUTSIDE)
        return SlotPredictions(dense_logits, vector, box), SlotPredictions(unique_logits, vector, box)

    def _boxes(self, vectors: Float[Tensor, "B n C"], size: tuple[int, int], stride: int) -> Float[Tensor, "B n 4"]:
        """Return the boxes of a level's cells, cx cy w h, pixels; in float32, as half precision would be off by percents."""
        device = vectors.device.type
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
            logarithms = self.box_head(vectors.to(self.box_head.weight.dtype)).float()
        sides = logarithms.clamp(max=6).exp()  # distances to left, top, right, bottom, in cells
        center = cell_grid(*size, like=sides)
        corners = torch.cat([center - sides[..., :2], center + sides[..., 2:]], -1)
        return box_ops.to_centers(corners * stride)

    @torch.no_grad()
    def _queries(self, dense: SlotPredictions, unique: SlotPredictions) -> SlotPredictions:
        """Return the N cells with the highest one-to-one scores, best first.

        Their logits are the mean of those of both class heads, less a penalty that grows with the IoU with a better query of the
        same class. All queries are compared at once.
        """
        assert unique.boxes is not None
        assert unique.mask_params is not None
        best = unique.class_logits.amax(2).topk(min(self.config.num_queries, unique.class_logits.shape[1]), 1).indices[..., None]
        logits, dense_logits, vectors, boxes = (
            values.gather(1, best.expand(-1, -1, values.shape[2]))
            for values in (unique.class_logits, dense.class_logits, unique.mask_params, unique.boxes)
        )
        penalty = self.config.duplicate_penalty * overlap_with_better(logits, boxes).square()
        return SlotPredictions((logits + dense_logits) / 2 - penalty[..., None], vectors, boxes)

    def draw_masks(
        self,
        features: Float[Tensor, "B D h w"],
        image: Int[Tensor, "n"],
        vectors: Float[Tensor, "n C"],
        boxes: Float[Tensor, "n 4"],
    ) -> Float[Tensor, "n S S"]:
        """Return the logits of masks in the regions of their boxes, see `region`.

        A logit is computed from a bilinear sample of the mask features and its position relative to the box, from -1 to 1 across
        it, by a network with one hidden layer, whose weights `kernel_head` computes from the vector.

        Args:
            features: mask features of the batch.
            image: index of the image of each mask.
            vectors: of the cells.
            boxes: x0 y0 x1 y1, pixels of the canvas.
        """
        hidden, size = self.config.mask_hidden_dim, self.config.mask_size
        features = features.float().contiguous()
        finite = self.region(boxes).float().nan_to_num(0.0, 0.0, 0.0)  # the kernel of roi_align may crash on others
        regions = torch.cat([image[:, None].float(), finite], 1)
        samples = roi_align(features, regions, size, 1 / _MASK_STRIDE, sampling_ratio=1, aligned=True)  # [n D S S]
        position = cell_grid(size, size, like=samples).T * (2 / size) - 1  # [2 S*S], x and y across the region
        position = position * (1 + self.config.box_margin)
        kernels = self.kernel_head(vectors.to(self.kernel_head.weight.dtype)).float()
        weights, biases, last, last_bias = kernels.split(self._kernel_sizes(), 1)
        weights = weights.unflatten(1, (hidden, -1))
        states = torch.baddbmm(biases[..., None], weights[..., :-2], samples.flatten(2)) + weights[..., -2:] @ position
        return torch.baddbmm(last_bias[..., None], last[:, None], states.relu())[:, 0].unflatten(1, (size, size))

    def region(self, boxes: Float[Tensor, "... 4"]) -> Float[Tensor, "... 4"]:
        """Return the corner boxes, enlarged about their centers by the margin, in which masks are drawn."""
        center, size = box_ops.to_centers(boxes).split(2, dim=-1)
        return box_ops.to_corners(torch.cat([center, size * (1 + self.config.box_margin)], -1))

    def loss(self, output: ModelOutput, images: ImageBatch, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Return the terms "class" of the one-to-one and "class/0" of the one-to-many class logits of the cells, and "box_l1",
        "box_giou", "mask" and "mask_dice" of their boxes and vectors. Queries, which are some of the cells, have no other loss.

        Masks are drawn and compared in the predicted boxes, as at inference. Computed in float32.
        """
        with torch.autocast(images.pixels.device.type, enabled=False):
            return self._terms(output, images, targets)

    def _terms(self, output: ModelOutput, images: ImageBatch, targets: Sequence[Instances]) -> dict[str, Tensor]:
        settings, floor = self.config, self.config.min_target
        cells, unique_cells, _ = output.layers
        assert cells.boxes is not None
        lengths, scale = [len(objects) for objects in targets], _scale(images)
        padded_labels = pad([objects.labels for objects in targets]).to(scale.device)  # [B T]
        padded_boxes = pad([objects.boxes for objects in targets]).to(scale.device, torch.float32)  # [B T 4]
        labels = [row[:length] for row, length in zip(padded_labels, lengths, strict=True)]

        corners = box_ops.to_corners(cells.boxes) * scale
        boxes = [row[:length] for row, length in zip(padded_boxes, lengths, strict=True)]
        overlaps = [overlap(*each) for each in zip(boxes, corners, strict=True)]
        dense = assign(cells.class_logits, overlaps, labels, settings.positives, settings.dense_powers, floor)
        unique = assign(unique_cells.class_logits, overlaps, labels, 1, settings.unique_powers, floor)

        object_count = distributed.divisor(sum(lengths), like=scale)
        target_sum = distributed.divisor(dense.targets.sum(), like=scale)
        l1, giou = self._box_losses(corners, dense, padded_boxes)
        return {
            "class": self._class_loss(unique_cells, unique, padded_labels) / object_count,
            "class/0": self._class_loss(cells, dense, padded_labels) / target_sum,
            "box_l1": l1 / target_sum,
            "box_giou": giou / target_sum,
            **self._mask_losses(output, corners, dense, targets),
        }

    def _class_loss(self, slots: SlotPredictions, assignment: Assignment, labels: Int[Tensor, "B T"]) -> Tensor:
        """Return the sum of the varifocal losses of all slots and classes."""
        logits = slots.class_logits.float()
        channels = assignment.slots * logits.shape[2] + labels[..., None]  # [B T k], indices of slot and class
        expected = torch.zeros_like(logits).flatten(1)
        expected = expected.scatter_reduce(1, channels.flatten(1), assignment.targets.flatten(1), "amax").view_as(logits)
        return self.config.class_weight * varifocal_loss(logits, expected).sum()

    def _box_losses(
        self, corners: Float[Tensor, "B N 4"], dense: Assignment, boxes: Float[Tensor, "B T 4"]
    ) -> tuple[Tensor, Tensor]:
        """Return the sums of the L1 and generalized IoU losses of the assigned cells, weighted by their class targets.

        The L1 distance is relative to the width and height of the object, of at least two pixels, and at most 8.
        """
        image = torch.arange(len(corners), device=corners.device)[:, None, None]
        predicted = corners[image, dense.slots]  # [B T k 4]
        expected = boxes[:, :, None]  # [B T 1 4]
        size = (expected[..., 2:] - expected[..., :2]).clamp(min=2)
        l1 = ((predicted - expected) / torch.cat([size, size], -1)).abs().sum(-1).clamp(max=8)
        giou = 1 - box_ops.generalized_iou(predicted, expected)
        return self.config.l1_weight * (l1 * dense.targets).sum(), self.config.giou_weight * (giou * dense.targets).sum()

    def _mask_losses(
        self, output: ModelOutput, corners: Float[Tensor, "B N 4"], dense: Assignment, targets: Sequence[Instances]
    ) -> dict[str, Tensor]:
        """Return the mean cross-entropy and dice loss of the masks of the `mask_positives` best cells of each object."""
        vectors, features = output.layers[0].mask_params, output.mask_features
        assert vectors is not None
        assert features is not None
        lengths, count = [len(objects) for objects in targets], min(self.config.mask_positives, dense.slots.shape[2])
        image = torch.arange(len(targets)).repeat_interleave(torch.tensor(lengths)).to(corners.device)
        target = torch.cat([torch.arange(length) for length in lengths]).to(corners.device)
        slots = dense.slots[image, target, :count].flatten()
        weights = (dense.targets[image, target, :count] > 0).flatten().float()
        image = image.repeat_interleave(count)
        boxes = corners.detach()[image, slots]
        logits = self.draw_masks(features, image, vectors[image, slots], boxes)
        regions = self.region(boxes).cpu().split([length * count for length in lengths])  # the only copy to the host
        masks = [
            crop(objects.masks[[i for i in range(len(objects)) for _ in range(count)]], region, self.config.mask_size)
            for objects, region in zip(targets, regions, strict=True)
        ]
        expected = torch.cat(masks).to(logits.device, torch.float32)
        total = distributed.divisor(weights.sum(), like=logits)
        entropy = F.binary_cross_entropy_with_logits(logits, expected, reduction="none").mean((1, 2))
        dice = squared_dice_loss(logits.sigmoid(), expected, eps=1.0)
        return {
            "mask": self.config.mask_weight * (entropy * weights).sum() / total,
            "mask_dice": self.config.dice_weight * (dice * weights).sum() / total,
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
        """Return the `limit` best pairs of query and class of each image; a query may appear with several classes.

        The score is the class probability times the mean probability inside the mask. There is no NMS. Boxes are the bounding
        boxes of the masks.
        """
        queries, features, detections = output.layers[-1], output.mask_features, []
        assert queries.boxes is not None
        assert queries.mask_params is not None
        assert features is not None
        with torch.autocast(images.pixels.device.type, enabled=False):  # rounding would move the masks' edges
            corners, count = box_ops.to_corners(queries.boxes) * _scale(images), queries.boxes.shape[1]
            image = torch.arange(len(images), device=corners.device).repeat_interleave(count)
            vectors = queries.mask_params.flatten(0, 1)
            drawn = self.draw_masks(features, image, vectors, corners.flatten(0, 1)).sigmoid().unflatten(0, (-1, count))
            inside = drawn >= _MASK_THRESHOLD
            confidence = (drawn * inside).sum((2, 3)) / inside.sum((2, 3)).clamp(min=1)
            all_scores = queries.class_logits.float().sigmoid() * confidence[..., None]
            regions = self.region(box_ops.to_corners(queries.boxes))  # fractions of the image
            for scores, masks, region, size in zip(all_scores, drawn, regions, sizes, strict=True):
                best, index = scores.flatten().topk(min(limit, scores.numel()))
                best, index = best[best >= threshold], index[best >= threshold]
                slots, mask_of = (index // scores.shape[1]).unique(return_inverse=True)  # one mask for all classes
                painted = paste_soft(masks[slots], region[slots] * box_ops.scale_of(size, region), size, _MASK_THRESHOLD)
                painted = painted[mask_of.tolist()]
                labels = (index % scores.shape[1]).cpu()
                detections.append(Instances(labels, painted.boxes(), painted, best.cpu(), self.categories))
        return detections


def overlap_with_better(logits: Float[Tensor, "B N K"], boxes: Float[Tensor, "B N 4"]) -> Float[Tensor, "B N"]:
    """Return the greatest IoU of each query with one before it whose best class is the same.

    Args:
        logits: of the queries, best first.
        boxes: cx cy w h.
    """
    corners, label = box_ops.to_corners(boxes), logits.argmax(2)
    same = label[:, :, None] == label[:, None]
    return (box_ops.iou(corners[:, :, None], corners[:, None]) * same).tril(-1).amax(2)


def _scale(images: ImageBatch) -> Float[Tensor, "B 1 4"]:
    """Return width, height, width, height of each image without padding, pixels."""
    return images.sizes.flip(1).repeat(1, 2)[:, None].to(images.pixels.device, torch.float32)
