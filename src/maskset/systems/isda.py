"""ISDA: Position-Aware Instance Segmentation with Deformable Attention (Ying et al., ICASSP 2022, arXiv:2202.12251).

Each query predicts a class and a kernel: D = 256 numbers, of which the last two are the query's reference point. All masks of
an image are drawn on one map of mask features, each by the 1x1 convolution with its kernel. There are no boxes: objects are
matched by class and mask alone. ISDA is built on Deformable DETR. From top to bottom this file follows the paper's overview:
backbone and neck, mask feature head, deformable transformer, mask head, then matching, loss and results.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from maskset import distributed
from maskset.config import Fraction, NonNegativeFloat, PositiveInt, config, setting
from maskset.detection import Matches, class_targets, focal_cost, match, pad, soft_iou_cost, top_k_detections
from maskset.errors import ConfigError
from maskset.instances import Category, Instances
from maskset.layers.backbone import LevelProjection
from maskset.layers.blocks import Mlp
from maskset.layers.transformer import DecoderLayer, Encoder, flatten_levels, inverse_sigmoid, reset_transformer
from maskset.losses import chunked_loss, focal_loss, name_by_layer, squared_dice_loss
from maskset.masks.heads.features import MaskFeatureHead, dynamic_conv, with_coordinates
from maskset.masks.paint import paint_probabilities
from maskset.masks.targets import downsample_by_stride
from maskset.structures import ImageBatch, ModelOutput, SlotPredictions
from maskset.systems.base import BackboneConfig, InputConfig, System, SystemConfig, check_canvas, check_divisor, check_heads

_CANVAS = 32  # pixels; on multiples of it each pyramid level is exactly twice as large as the next
_CANDIDATES = 100  # number of pairs of query and class, best by class probability, whose masks are drawn and scored
_MAX_CELLS = 2**22  # cells of the masks that are in memory at a time in the matching
_MASK_THRESHOLD = 0.5  # probability above which a cell belongs to a mask


@config
class IsdaConfig(SystemConfig):
    """Settings of ISDA; the defaults are those of the official ResNet-50 model."""

    system: Literal["isda"] = "isda"
    input: InputConfig = setting(InputConfig(divisor=_CANVAS), "how images become the network's input")
    backbone: BackboneConfig = setting(BackboneConfig(), "the backbone")
    hidden_dim: PositiveInt = setting(256, "width C of neck and transformer")
    num_heads: PositiveInt = setting(8, "attention heads")
    num_levels: int = setting(4, "feature levels of the transformer, strides 8, 16, 32, 64")
    num_points: PositiveInt = setting(4, "sampling points of an attention head in a level")
    feedforward_dim: PositiveInt = setting(1024, "hidden width of the transformer's MLPs")
    dropout: Fraction = setting(0.1, "dropout in the transformer")
    encoder_layers: PositiveInt = setting(6, "deformable encoder layers")
    decoder_layers: PositiveInt = setting(6, "decoder layers")
    num_queries: PositiveInt = setting(300, "N, number of object queries: the maximum number of objects per image")
    mask_hidden_dim: PositiveInt = setting(128, "width inside the mask feature head")
    mask_dim: int = setting(256, "D, width of the mask features and length of a kernel, including its two coordinates")
    mask_stride: int = setting(4, "ablation on mask resolution: pixels per cell of the mask features; 2, 4 or 8")
    feature_coordinates: bool = setting(
        True, "ablation on positional information, MP: x and y enter the mask features at stride 32"
    )
    kernel_position: bool = setting(
        True, "ablation on positional information, KP: a kernel ends with its query's reference point"
    )
    mask_weight: NonNegativeFloat = setting(3.0, "weight of the dice loss, and of the soft IoU in the matching")
    class_weight: NonNegativeFloat = setting(2.0, "weight of the focal loss, and in the matching")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self, "hidden_dim", "num_heads", 4)
        if self.num_levels < 3:
            raise ConfigError(
                f"model.num_levels must be at least 3, got {self.num_levels}: the mask features need strides 8, 16 and 32."
            )
        if self.mask_dim <= 2 * self.kernel_position:
            raise ConfigError(f"model.mask_dim must be at least {1 + 2 * self.kernel_position}, got {self.mask_dim}.")
        if self.mask_stride not in (2, 4, 8):
            raise ConfigError(f"model.mask_stride must be 2, 4 or 8, got {self.mask_stride}.")
        check_divisor(self, _CANVAS)

    def build(self, categories: tuple[Category, ...]) -> "Isda":
        """Return an untrained ISDA."""
        return Isda(self, categories)


class Isda(System):
    """The network of the paper's overview. See `IsdaConfig` for its parts."""

    SLOT_PARTS = ("query_position", "query_content")

    config: IsdaConfig

    def __init__(self, config: IsdaConfig, categories: tuple[Category, ...]) -> None:
        super().__init__(config, categories, num_slots=config.num_queries)
        width, deformable = config.hidden_dim, (config.num_heads, config.num_levels, config.num_points)
        # Backbone and neck: C2 ... C5 become P2, and P3 ... P6
        self.backbone = config.backbone.build(finest=4)
        self.project_finest = LevelProjection(self.backbone.channels[:1], width, 1, bias=False)
        self.project = LevelProjection(self.backbone.channels[1:], width, config.num_levels, bias=False)
        # Mask feature head, of P2 ... P5
        channels = [width, width, width, width + 2 * config.feature_coordinates]
        upsampling_steps = [int(math.log2(stride / config.mask_stride)) for stride in self.backbone.strides]
        self.mask_feature_head = MaskFeatureHead(channels, upsampling_steps, config.mask_hidden_dim, config.mask_dim)
        # Deformable transformer, on P3 ... P6
        self.level_embedding = nn.Parameter(torch.randn(config.num_levels, width))
        self.encoder = Encoder(config.encoder_layers, width, *deformable, config.feedforward_dim, config.dropout)
        self.query_position = nn.Parameter(torch.randn(config.num_queries, width))
        self.query_content = nn.Parameter(torch.randn(config.num_queries, width))
        self.reference_points = nn.Linear(width, 2)
        self.decoder = nn.ModuleList(
            DecoderLayer(width, *deformable, config.feedforward_dim, config.dropout) for _ in range(config.decoder_layers)
        )
        # Mask head: the same for all layers
        self.class_head = nn.Linear(width, config.num_classes)
        self.kernel_head = Mlp(width, width, width, config.mask_dim - 2 * config.kernel_position)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """Initialize as the official code does. Backbone, P3 ... P6 and mask feature head initialize themselves."""
        for convolution in self.project_finest.convolutions:
            assert isinstance(convolution, nn.Conv2d)
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        reset_transformer(self.encoder, self.decoder, self.reference_points)
        nn.init.zeros_(self.reference_points.bias)
        nn.init.constant_(self.class_head.bias, -math.log(99))  # every class starts at a probability of 0.01

    def forward(self, images: ImageBatch) -> ModelOutput:
        """Return class logits [B N K] and kernels [B N D] for every decoder layer, and the mask features [B D h w]."""
        check_canvas(images, self.input.divisor)
        finest, *coarser = self.backbone(images.pixels)  # C2; C3 ... C5
        levels = self.project(coarser)  # P3 ... P6, strides 8, 16, 32, 64; each [B C h w]
        mask_features = self._mask_features([*self.project_finest([finest]), *levels[:3]])
        paddings = [images.padding((level.shape[2], level.shape[3])) for level in levels]
        memory = self.encoder(flatten_levels(levels, paddings, self.level_embedding))
        position, content = (query.expand(len(images), -1, -1) for query in (self.query_position, self.query_content))
        reference = self.reference_points(position).float().sigmoid()  # the same for every image and layer
        layers = []
        for layer in self.decoder:
            content = layer(content, position, reference, memory)  # [B N C]
            layers.append(SlotPredictions(self.class_head(content), self._kernels(content, reference)))
        return ModelOutput(layers, mask_features=mask_features)

    def _mask_features(self, levels: Sequence[Float[Tensor, "B C _ _"]]) -> Float[Tensor, "B D h w"]:
        """Return the mask features from P2 ... P5; the coarsest level gets two channels with its coordinates in the canvas."""
        *finer, coarsest = levels
        return self.mask_feature_head([*finer, with_coordinates(coarsest) if self.config.feature_coordinates else coarsest])

    def _kernels(self, content: Float[Tensor, "B N C"], reference: Float[Tensor, "B N 2"]) -> Float[Tensor, "B N D"]:
        """Return position-aware kernels: 254 numbers from the query's state, and its reference point before the sigmoid."""
        kernels = self.kernel_head(content)
        return torch.cat([kernels, inverse_sigmoid(reference)], -1) if self.config.kernel_position else kernels

    def loss(self, output: ModelOutput, images: ImageBatch, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Return two terms for every layer: class (focal) and mask (dice), each divided by the number of matched slots.

        Only the masks of matched slots are drawn, in the memory of one layer, on the whole canvas with its padding. The paper
        has 1 - IoU as mask loss; the official code uses it in the matching only. Computed in float32.
        """
        with torch.autocast(images.pixels.device.type, enabled=False):
            return self._terms(output, targets)

    def _terms(self, output: ModelOutput, targets: Sequence[Instances]) -> dict[str, Tensor]:
        settings, layers = self.config, output.layers
        assert output.mask_features is not None
        features = output.mask_features.float()
        logits = torch.stack([layer.class_logits for layer in layers]).float()  # [L B N K]
        kernels = torch.stack([layer.mask_params for layer in layers if layer.mask_params is not None]).float()  # [L B N D]
        size = (features.shape[2], features.shape[3])
        masks = [downsample_by_stride(instances.masks, settings.mask_stride, size).to(features.device) for instances in targets]
        labels = pad([instances.labels for instances in targets]).to(logits.device)
        with torch.no_grad():
            cost = settings.class_weight * focal_cost(logits, labels, eps=1e-12)
            cost = cost + settings.mask_weight * _mask_cost(kernels, features, masks)
        pairs = match(cost, [len(instances) for instances in targets], {"class_logits": logits, "kernels": kernels})
        count = distributed.divisor(len(pairs) / len(layers), like=logits)
        expected = class_targets(logits, labels, pairs)
        terms = {
            "class": settings.class_weight * focal_loss(logits, expected).sum((1, 2, 3)) / count,
            "mask": settings.mask_weight * _mask_loss(kernels, features, masks, pairs) / (count + 1e-5),
        }
        return name_by_layer(terms, len(layers))

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

        The best pairs by class probability are rescored with their masks and sorted; the official code does not sort again.
        """
        last = output.layers[-1]
        assert last.mask_params is not None
        assert output.mask_features is not None
        detections = []
        with torch.autocast(images.pixels.device.type, enabled=False):  # rounding would move the masks' edges
            each_image = zip(last.class_logits, last.mask_params, output.mask_features, images.sizes.tolist(), sizes, strict=True)
            for logits, kernels, features, input_size, size in each_image:
                count = max(limit, _CANDIDATES)
                scores, labels, mask_of, drawn = _candidates(logits.float(), kernels.float(), features.float(), count, threshold)
                best = scores.argsort(descending=True, stable=True)[:limit]
                best = best[scores[best] >= threshold]
                painted, mask_of = mask_of[best].unique(return_inverse=True)  # a query's mask once, for all its classes
                masks = paint_probabilities(drawn[painted], self.config.mask_stride, input_size, size)[mask_of.tolist()]
                detections.append(Instances(labels[best].cpu(), masks.boxes(), masks, scores[best].cpu(), self.categories))
        return detections


def _mask_cost(
    kernels: Float[Tensor, "L B N D"], features: Float[Tensor, "B D h w"], masks: Sequence[Float[Tensor, "_ h w"]]
) -> Float[Tensor, "L B N T"]:
    """Return 1 - soft IoU of the mask of every slot and every object of its image, drawing a few masks at a time."""
    layers, batch, slots, _ = kernels.shape
    chunk_size = max(1, _MAX_CELLS // features[0, 0].numel())
    cost = kernels.new_zeros(batch, layers * slots, max(map(len, masks)))
    for i, image_masks in enumerate(masks):
        for start in range(0, layers * slots if len(image_masks) else 0, chunk_size):
            drawn = dynamic_conv(features[i], kernels[:, i].flatten(0, 1)[start : start + chunk_size]).sigmoid_()
            cost[i, start : start + chunk_size, : len(image_masks)] = soft_iou_cost(drawn, image_masks)
    return cost.unflatten(1, (layers, slots)).transpose(0, 1)


def _mask_loss(
    kernels: Float[Tensor, "L B N D"],
    features: Float[Tensor, "B D h w"],
    masks: Sequence[Float[Tensor, "_ h w"]],
    pairs: Matches,
) -> Float[Tensor, "L"]:
    """Return the sum of the dice losses of each layer's matched slots, in the memory of one layer."""
    layers, counts = len(kernels), [*pairs.counts]
    matched = kernels[pairs.layer, pairs.image, pairs.slot].unflatten(0, (layers, sum(counts)))
    objects = pairs.object.unflatten(0, (layers, sum(counts)))

    def compute_losses(layer: int, kernels: Float[Tensor, "m D"], features: Float[Tensor, "B D h w"]) -> Float[Tensor, "1"]:
        losses = []
        each_image = zip(features.unbind(), kernels.split(counts), masks, objects[layer].split(counts), strict=True)
        for image_features, image_kernels, image_masks, index in each_image:
            drawn = dynamic_conv(image_features, image_kernels).sigmoid()
            losses.append(squared_dice_loss(drawn, image_masks[index], eps=0.002))
        return torch.cat(losses).sum()[None]

    return chunked_loss(compute_losses, matched.unbind(), features)[:, 0]


def _candidates(
    logits: Float[Tensor, "N K"], kernels: Float[Tensor, "N D"], features: Float[Tensor, "D h w"], count: int, threshold: float
) -> tuple[Float[Tensor, "n"], Int[Tensor, "n"], Int[Tensor, "n"], Float[Tensor, "m h w"]]:
    """Return the `count` pairs of query and class with the highest class probabilities: scores, labels, mask indices and masks.

    A score is the class probability times the mean probability of the cells inside the mask, 0 for an empty mask. Each
    query's mask is drawn once; the mask indices say which of the m masks belongs to each of the n pairs.
    """
    slots, labels, scores = top_k_detections(logits, count, threshold)  # a mask can only lower the score
    queries, mask_of = slots.unique(return_inverse=True)
    drawn = dynamic_conv(features, kernels[queries]).sigmoid()
    inside = drawn > _MASK_THRESHOLD
    confidence = (drawn * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-5)
    return scores * confidence[mask_of], labels, mask_of, drawn
