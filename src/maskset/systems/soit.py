"""SOIT: Segmenting Objects with Instance-Aware Transformers (Yu et al., AAAI 2022, arXiv:2112.11037).

Each query predicts a class, a box and D = 441 numbers: the weights of a small transformer for this instance alone, which
attends to a feature map of the whole image and draws the mask. SOIT is built on two-stage Deformable DETR with box refinement.
From top to bottom this file follows figure 2: backbone and encoder, mask encoder, decoder with its three heads, instance-aware
transformer, then loss and results.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from maskset import boxes as box_ops
from maskset import distributed
from maskset.config import Bounds, Fraction, NonNegativeFloat, NonNegativeInt, PositiveInt, config, setting
from maskset.detection import Matches, match_and_box_losses, top_k_detections
from maskset.instances import Category, Instances, Masks
from maskset.layers.backbone import LevelProjection
from maskset.layers.blocks import Mlp, clones
from maskset.layers.transformer import DecoderLayer, Encoder, Memory, Proposals, flatten_levels, refine, reset_transformer
from maskset.losses import chunked_loss, name_by_layer, squared_dice_loss
from maskset.masks.heads.instance_transformer import instance_transformer, parameter_count
from maskset.masks.paint import paint
from maskset.masks.resize import align_corners, aligned_bilinear, resample
from maskset.masks.targets import resize_align_corners
from maskset.structures import ImageBatch, ModelOutput, SlotPredictions
from maskset.systems.base import BackboneConfig, System, SystemConfig, check_canvas, check_heads

_UPSAMPLING = 4  # masks are predicted at stride 8 and upsampled to stride 2
_MAX_SAMPLES = 2**22  # sampling points of the instance-aware transformer in memory at a time: about 200 MB in training


@config
class SoitConfig(SystemConfig):
    """Settings of SOIT; the defaults are those of the official ResNet-50 model."""

    system: Literal["soit"] = "soit"
    backbone: BackboneConfig = setting(BackboneConfig(), "the backbone")
    hidden_dim: PositiveInt = setting(256, "width C of the transformer")
    num_heads: PositiveInt = setting(8, "attention heads")
    num_levels: PositiveInt = setting(4, "feature levels, strides 8, 16, 32, 64")
    num_points: PositiveInt = setting(4, "sampling points of an attention head in a level")
    feedforward_dim: PositiveInt = setting(1024, "hidden width of the transformer's MLPs")
    dropout: Fraction = setting(0.1, "dropout in the transformer")
    encoder_layers: PositiveInt = setting(6, "deformable encoder layers")
    decoder_layers: PositiveInt = setting(6, "decoder layers")
    num_queries: PositiveInt = setting(300, "N, number of object queries: the maximum number of objects per image")
    mask_encoder_layers: NonNegativeInt = setting(
        1, "Table 3b: one-head encoder layers on the finest level, for the mask features"
    )
    mask_channels: PositiveInt = setting(8, "Table 3a: C of the instance-aware transformer")
    mask_heads: PositiveInt = setting(4, "Table 2: M of the instance-aware transformer")
    mask_points: PositiveInt = setting(4, "K, sampling points of each of its heads")
    mask_positions: Literal["relative", "absolute", "none"] = setting("relative", "Table 4: position encoding of the pixels")
    mask_loss_layers: int = setting(6, "Table 5: number of last decoder layers with mask losses")
    class_weight: NonNegativeFloat = setting(2.0, "weight of the focal loss, and in the matching")
    l1_weight: NonNegativeFloat = setting(5.0, "weight of the L1 box loss, and in the matching")
    giou_weight: NonNegativeFloat = setting(2.0, "weight of the generalized IoU loss, and in the matching")
    dice_weight: NonNegativeFloat = setting(8.0, "weight of the masks' dice loss")
    bce_weight: NonNegativeFloat = setting(2.0, "weight of the masks' binary cross-entropy")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self, "hidden_dim", "num_heads", 4)
        check_heads(self, "mask_channels", "mask_heads", 4)
        Bounds(1, self.decoder_layers).check("model.mask_loss_layers", self.mask_loss_layers)

    def build(self, categories: tuple[Category, ...]) -> "Soit":
        """Return an untrained SOIT."""
        return Soit(self, categories)


class Soit(System):
    """The network of figure 2. See `SoitConfig` for its parts."""

    PROPOSAL_PARTS = ("proposal_class_head",)

    config: SoitConfig

    def __init__(self, config: SoitConfig, categories: tuple[Category, ...]) -> None:
        super().__init__(config, categories, num_slots=config.num_queries)
        width, deformable = config.hidden_dim, (config.num_heads, config.num_levels, config.num_points)
        mlp_settings = (config.feedforward_dim, config.dropout)
        # Backbone and encoder
        self.backbone = config.backbone.build()
        self.project = LevelProjection(self.backbone.channels, width, config.num_levels, bias=False)
        self.level_embedding = nn.Parameter(torch.randn(config.num_levels, width))
        self.encoder = Encoder(config.encoder_layers, width, *deformable, *mlp_settings)
        # Mask encoder ("Shared Mask Features"): encodes the finest level again, with one head, then reduces its channels
        self.mask_encoder = Encoder(config.mask_encoder_layers, width, 1, 1, 4, *mlp_settings)
        self.mask_projection = nn.Linear(width, config.mask_channels)
        self.mask_norm = nn.LayerNorm(config.mask_channels)
        # Decoder and its heads: class and box for each layer and for the proposals, one mask head for all layers
        self.proposals = Proposals(width)
        self.decoder = nn.ModuleList(DecoderLayer(width, *deformable, *mlp_settings) for _ in range(config.decoder_layers))
        self.class_heads = clones(nn.Linear(width, config.num_classes), config.decoder_layers)
        self.proposal_class_head = copy.deepcopy(self.class_heads[0])  # channel 0 is objectness
        self.box_heads = clones(Mlp(width, width, width, 4), config.decoder_layers + 1)
        numbers = parameter_count(config.mask_channels, config.mask_heads, config.mask_points)
        self.mask_head = Mlp(width, width, width, numbers)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """Initialize as the official code does. Backbone and projection initialize themselves."""
        reset_transformer(self.encoder, self.mask_encoder, self.mask_projection, self.proposals, self.decoder)
        for class_head, box_head in zip([*self.class_heads, self.proposal_class_head], self.box_heads, strict=True):
            assert isinstance(class_head, nn.Linear)
            assert isinstance(box_head, Mlp)
            nn.init.constant_(class_head.bias, -math.log(99))  # every class starts at a probability of 0.01
            nn.init.zeros_(box_head.last.weight)
            nn.init.zeros_(box_head.last.bias)

    def forward(self, images: ImageBatch) -> ModelOutput:
        """Return for every decoder layer class logits [B N K], boxes [B N 4] and mask weights [B N D], and mask features."""
        check_canvas(images, self.input.divisor)
        levels = self.project(self.backbone(images.pixels))  # strides 8, 16, 32, 64; each [B C h w]
        paddings = [images.padding((level.shape[2], level.shape[3])) for level in levels]
        memory = self.encoder(flatten_levels(levels, paddings, self.level_embedding))
        mask_features = self._mask_features(memory)
        proposals, best = self.proposals(memory, self.proposal_class_head, self.box_heads[-1], self.config.num_queries)
        position, content = self.proposals.queries(best)
        reference, layers = best.sigmoid(), []
        for layer, class_head, box_head in zip(self.decoder, self.class_heads, self.box_heads, strict=False):
            content = layer(content, position, reference, memory)  # [B N C]
            boxes = refine(box_head(content).float(), reference)
            layers.append(SlotPredictions(class_head(content), self.mask_head(content), boxes))
            reference = boxes.detach()
        return ModelOutput(layers, mask_features, proposals)

    def _mask_features(self, memory: Memory) -> Float[Tensor, "B C h w"]:
        """Return the feature map that instance-aware transformers attend to: the finest level of the memory, encoded again."""
        height, width = memory.shapes[0]
        cells = height * width
        finest = Memory(
            memory.cells[:, :cells],
            memory.positions[:, :cells],
            memory.padding[:, :cells],
            memory.shapes[:1],
            memory.valid[:, :1],
        )
        features = self.mask_norm(self.mask_projection(self.mask_encoder(finest).cells))
        return features.transpose(1, 2).unflatten(2, (height, width))

    def loss(self, output: ModelOutput, images: ImageBatch, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Return the terms of every layer: class (focal), box_l1, box_giou, mask_dice and mask_bce; proposals have no masks.

        Each is divided by the number of matched pairs of its layer, the cross-entropy also by the number of pixels of the image.
        As in the official code, padding counts as background in the mask terms. Computed in float32.
        """
        with torch.autocast(images.pixels.device.type, enabled=False):
            labels = [instances.labels for instances in targets]
            boxes = [box_ops.fractions(instances.boxes, instances.masks.size) for instances in targets]
            pairs, terms = self._detection_terms(output.layers, labels, boxes)
            assert output.proposals is not None  # the first stage only separates objects from background
            objectness = [torch.zeros_like(label) for label in labels]
            first = self._detection_terms([output.proposals], objectness, boxes)[1]
            terms |= self._mask_terms(output, images, targets, pairs)  # last: matching waits for the device, this does not
            return name_by_layer(terms, len(output.layers)) | {f"{name}/proposals": term[0] for name, term in first.items()}

    def _detection_terms(
        self, layers: Sequence[SlotPredictions], labels: Sequence[Int[Tensor, "_"]], boxes: Sequence[Float[Tensor, "_ 4"]]
    ) -> tuple[Matches, dict[str, Float[Tensor, "L"]]]:
        weights = (self.config.class_weight, self.config.l1_weight, self.config.giou_weight)
        pairs, sums = match_and_box_losses(layers, labels, boxes, weights, eps=1e-12)
        count = distributed.divisor(len(pairs) / len(layers), like=sums["class"])
        return pairs, {name: value / count for name, value in sums.items()}

    def _mask_terms(
        self, output: ModelOutput, images: ImageBatch, targets: Sequence[Instances], pairs: Matches
    ) -> dict[str, Float[Tensor, "_"]]:
        """Return dice and cross-entropy of the masks of the matched queries, for the layers that have mask losses.

        The masks are drawn in chunks, whose memory is freed before the next: memory does not grow with layers and objects.
        """
        assert output.mask_features is not None
        settings, features = self.config, output.mask_features.float()
        chunks, mask_targets = list(self._chunks(output, pairs)), _mask_targets(images, targets, features)

        def draw_and_compare(i: int, weights: Float[Tensor, "n D"], features: Float[Tensor, "B C h w"]) -> Float[Tensor, "2"]:
            image, objects = chunks[i].image, chunks[i].objects
            logits = self._draw(features[image], mask_targets.padding[image], weights, chunks[i].centers)
            rows, columns = (aligned_bilinear(cells, _UPSAMPLING) for cells in features.shape[2:])
            logits, masks = resample(logits, rows, columns), mask_targets.masks[image][objects]
            dice = squared_dice_loss(logits.sigmoid(), masks, 1e-5).sum()
            entropy = F.binary_cross_entropy_with_logits(logits, masks, reduction="sum") / mask_targets.pixels[image]
            return torch.stack([settings.dice_weight * dice, settings.bce_weight * entropy])

        sums = chunked_loss(draw_and_compare, [chunk.weights for chunk in chunks], features)  # [P 2]
        layer = torch.tensor([chunk.layer for chunk in chunks], device=sums.device)
        dice, entropy = sums.new_zeros(len(output.layers), 2).index_add(0, layer, sums)[-settings.mask_loss_layers :].unbind(1)
        count = distributed.divisor(len(pairs) / len(output.layers), like=sums)
        return {"mask_dice": dice / count, "mask_bce": entropy / count}

    def _chunks(self, output: ModelOutput, pairs: Matches) -> Iterator["_Chunk"]:
        """Yield the matched queries of the layers with mask losses in chunks of one layer and image, at least one chunk."""
        assert output.mask_features is not None
        size = self._chunk_size(output.mask_features)
        slots_of, objects_of = (part.split([*pairs.counts] * len(output.layers)) for part in (pairs.slot, pairs.object))
        for number in range(len(output.layers) - self.config.mask_loss_layers, len(output.layers)):
            layer = output.layers[number]
            assert layer.mask_params is not None
            assert layer.boxes is not None
            for image in range(len(layer.class_logits)):
                part = number * len(pairs.counts) + image
                for slots, objects in zip(slots_of[part].split(size), objects_of[part].split(size), strict=True):
                    weights, centers = layer.mask_params[image, slots].float(), layer.boxes[image, slots, :2].detach()
                    yield _Chunk(number, image, objects, weights, centers)

    def _chunk_size(self, features: Float[Tensor, "B C h w"]) -> int:
        """Return the number of instances whose sampling points fit into memory together."""
        samples = features.shape[2] * features.shape[3] * self.config.mask_heads * self.config.mask_points
        return max(1, _MAX_SAMPLES // samples)

    def _draw(
        self,
        features: Float[Tensor, "C h w"],
        padding: Bool[Tensor, "h w"],
        weights: Float[Tensor, "n D"],
        centers: Float[Tensor, "n 2"],
    ) -> Float[Tensor, "n h w"]:
        """Return the mask logits of instances of one image, at stride 8."""
        settings = (self.config.mask_heads, self.config.mask_points, self.config.mask_positions)
        return instance_transformer(features, padding, weights, centers, *settings)

    @torch.no_grad()
    def postprocess(
        self,
        output: ModelOutput,
        images: ImageBatch,
        sizes: Sequence[tuple[int, int]],
        limit: int = 100,
        threshold: float = 0.0,
    ) -> list[Instances]:
        """Return the `limit` best pairs of query and class of each image; a query may appear with several classes."""
        last = output.layers[-1]
        assert last.boxes is not None
        assert last.mask_params is not None
        detections = []
        for i, size in enumerate(sizes):
            slots, labels, scores = top_k_detections(last.class_logits[i], limit, threshold)
            queries, mask_of = slots.unique(return_inverse=True)  # draw a query once, however many classes it has
            with torch.autocast(slots.device.type, enabled=False):  # rounding would move the masks' edges
                masks = self._masks(output, images, i, queries, size)
            corners = box_ops.to_corners(last.boxes[i][slots]) * box_ops.scale_of(size, last.boxes)
            boxes = box_ops.clip(corners, size).cpu()
            detections.append(Instances(labels.cpu(), boxes, masks[mask_of.tolist()], scores.cpu(), self.categories))
        return detections

    def _masks(
        self, output: ModelOutput, images: ImageBatch, image: int, slots: Int[Tensor, "n"], size: tuple[int, int]
    ) -> Masks:
        """Return the masks of queries of one image, drawn on its part of the canvas, so that padding has no effect.

        In the official order: sigmoid at stride 2, resize to the size of the network's input, resize to `size`, threshold 0.5.
        """
        last, features = output.layers[-1], output.mask_features
        assert features is not None
        assert last.boxes is not None
        assert last.mask_params is not None
        padding = images.padding((features.shape[2], features.shape[3]))[image]
        height, width = int((~padding).any(1).sum()), int((~padding).any(0).sum())
        unpadded = features[image, :, :height, :width].float()
        parts = [
            self._draw(unpadded, padding[:height, :width], last.mask_params[image, chunk].float(), last.boxes[image, chunk, :2])
            for chunk in slots.split(self._chunk_size(features))
        ]
        rows, columns = (
            (aligned_bilinear(cells, _UPSAMPLING), align_corners(cells * _UPSAMPLING, length), align_corners(length, pixels))
            for cells, length, pixels in zip((height, width), images.sizes[image].tolist(), size, strict=True)
        )
        upsampled, to_input, to_size = zip(rows, columns, strict=True)
        return paint(torch.cat(parts), [upsampled, torch.sigmoid, to_input, to_size], cutoff=0.0)


class _Chunk(NamedTuple):
    """Matched queries of one layer and image: their objects, and the weights and box centers that their masks are drawn with."""

    layer: int
    image: int
    objects: Int[Tensor, "n"]
    weights: Float[Tensor, "n D"]
    centers: Float[Tensor, "n 2"]


class _MaskTargets(NamedTuple):
    """Targets of the mask losses: padding at stride 8, masks at stride 2 and number of pixels at stride 2 of each image."""

    padding: Bool[Tensor, "B h w"]
    masks: list[Float[Tensor, "_ 4*h 4*w"]]
    pixels: Float[Tensor, "B"]


def _mask_targets(images: ImageBatch, targets: Sequence[Instances], features: Float[Tensor, "B C h w"]) -> _MaskTargets:
    height, width = features.shape[2:]
    canvas, size = (images.pixels.shape[2], images.pixels.shape[3]), (height * _UPSAMPLING, width * _UPSAMPLING)
    padding = images.padding((height, width)).to(features.device)
    padded = resample(padding.float(), align_corners(height, size[0]), align_corners(width, size[1])) > 0
    masks = [resize_align_corners(instances.masks, canvas, size, features.device) for instances in targets]
    return _MaskTargets(padding, masks, (~padded).float().sum((1, 2)))
