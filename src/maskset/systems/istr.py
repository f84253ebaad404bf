"""ISTR: End-to-End Instance Segmentation with Transformers (Hu et al., 2021, arXiv:2105.00637).

Each of 300 learned query boxes predicts at most one object. In each of six stages, features of the box are read from the
feature pyramid; the query's object feature attends to them and to the other object features, and predicts class, mask code
(which the paper calls mask embedding) and a refined box for the next stage. A mask code is 60 numbers: principal components of
the mask inside its box on 28 x 28 pixels. From top to bottom this file follows figure 2 and section 3.3: backbone, image
features, stages with encoder and heads; then section 3.2: matching cost and set prediction loss; then results. This is the
model of the paper (official code of May 2021); `istr_smt.py` is that of the official code of 2022, with another mask head.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from maskset import boxes as box_ops
from maskset import distributed
from maskset.config import Fraction, NonNegativeFloat, PositiveInt, config, setting
from maskset.detection import cosine_cost, l1_cost, match_and_corner_losses, pad, squared_dice_cost, top_k_detections_in_image
from maskset.errors import ConfigError
from maskset.instances import Category, Instances
from maskset.layers.backbone import FeaturePyramid
from maskset.layers.blocks import clones
from maskset.layers.refinement import (
    DynamicAttention,
    RegionAttention,
    RegionEncoder,
    Tower,
    apply_deltas,
    image_feature,
    reset_stage,
)
from maskset.layers.roi import pyramid_roi_align, to_roi_dtype
from maskset.losses import name_by_layer, squared_dice_loss, sum_by_layer
from maskset.masks.codecs import files as codec_files
from maskset.masks.codecs.fittable import MAX_SIZE
from maskset.masks.codecs.flatten import FlattenCodec
from maskset.masks.codecs.logit_pca import LogitPcaCodec
from maskset.masks.paint import paste_soft
from maskset.masks.targets import crop
from maskset.structures import ImageBatch, ModelOutput, SlotPredictions
from maskset.systems.base import (
    BackboneConfig,
    InputConfig,
    System,
    SystemConfig,
    check_canvas,
    check_codec,
    check_divisor,
    check_heads,
)

_CANVAS = 32  # pixels; on multiples of it each pyramid level is exactly twice as large as the next
_MASK_THRESHOLD = 0.5


@config
class IstrConfig(SystemConfig):
    """Settings of ISTR; the defaults are those of the official ResNet-50 model."""

    system: Literal["istr"] = "istr"
    input: InputConfig = setting(InputConfig(divisor=_CANVAS), "how images become the network's input")
    backbone: BackboneConfig = setting(BackboneConfig(), "the backbone")
    hidden_dim: PositiveInt = setting(256, "d of the paper, width of pyramid and object features")
    image_feature: Literal["mean", "max", "none"] = setting("mean", "Table 1e: pooling for the initial object features")
    masked_pooling: bool = setting(
        False, "exclude padding from the image feature; officially included, so that results depend on the batch"
    )
    position_embedding: bool = setting(True, "Table 1e: add a learned embedding of each query to its initial object feature")
    num_queries: PositiveInt = setting(300, "k of the paper, number of queries: the maximum number of objects per image")
    stages: PositiveInt = setting(6, "N of the paper, number of refinement stages")
    num_heads: PositiveInt = setting(8, "attention heads")
    roi_size: PositiveInt = setting(7, "t of the paper, side of the grid on which a box's features are read, cells")
    attention: Literal["dynamic", "multi-head"] = setting("dynamic", "Table 1d: attention between an object feature and its box")
    dynamic_dim: PositiveInt = setting(64, "dynamic attention: width between its two layers")
    feedforward_dim: PositiveInt = setting(2048, "hidden width of the encoders' MLPs")
    dropout: Fraction = setting(0.0, "dropout in the encoders")
    codec: Literal["logit-pca", "flatten"] = setting("logit-pca", "Table 1a: principal components, or the pixels themselves")
    mask_size: PositiveInt = setting(28, "s of the paper, side S of the box-local mask, pixels")
    code_length: int = setting(60, "Table 1a: l of the paper, D numbers for a mask")
    codec_weights: str | None = setting(None, "file of a codec fitted by `maskset codecs fit`; None: fit it, or take --init's")
    target_noise: bool = setting(True, "logit-pca: draw the label smoothing of the target pixels at random at every call")
    mask_cost: Literal["cosine", "l1", "dice", "none"] = setting("cosine", "Table 1b: mask cost in the matching")
    mask_losses: Literal["both", "code", "dice"] = setting(
        "both", "Table 1c: mask losses, on the codes, on the decoded masks (dice), or both"
    )
    class_weight: NonNegativeFloat = setting(2.0, "weight of the focal loss, and in the matching")
    l1_weight: NonNegativeFloat = setting(5.0, "weight of the L1 box loss, and in the matching")
    giou_weight: NonNegativeFloat = setting(2.0, "weight of the generalized IoU loss, and in the matching")
    mask_weight: NonNegativeFloat = setting(2.0, "weight of each mask loss, and in the matching")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self, "hidden_dim", "num_heads")
        if self.image_feature == "none" and not self.position_embedding:
            raise ConfigError("model.image_feature none needs model.position_embedding: else all object features start as zero.")
        if self.mask_size > MAX_SIZE:
            raise ConfigError(f"model.mask_size must be at most {MAX_SIZE}, got {self.mask_size}.")
        check_codec(self, fitted=("logit-pca",))
        check_divisor(self, _CANVAS)

    def build(self, categories: tuple[Category, ...]) -> "Istr":
        """Return an untrained ISTR."""
        return Istr(self, categories)


class Stage(nn.Module):
    """One stage of figure 2: the transformer encoder, the box and mask heads, and the class head without its last layer."""

    def __init__(self, config: IstrConfig) -> None:
        super().__init__()
        width = config.hidden_dim
        if config.attention == "dynamic":
            attention = DynamicAttention(width, config.dynamic_dim, config.roi_size)
        else:
            attention = RegionAttention(width, config.num_heads)
        self.encoder = RegionEncoder(width, config.num_heads, config.feedforward_dim, config.dropout, attention)
        self.class_tower = Tower(width)
        self.box_head = nn.Sequential(Tower(width), nn.Linear(width, 4))
        self.mask_head = nn.Sequential(Tower(width), nn.Linear(width, config.code_length))


class Istr(System):
    """The network of figure 2. See `IstrConfig` for its parts."""

    SLOT_PARTS = ("query_boxes", "query_position")
    FITTED_PARTS = ("codec",)

    config: IstrConfig

    def __init__(self, config: IstrConfig, categories: tuple[Category, ...]) -> None:
        super().__init__(config, categories, num_slots=config.num_queries)
        # Backbone with FPN: P2 ... P5
        self.backbone = config.backbone.build(finest=4)
        self.pyramid = FeaturePyramid(self.backbone.channels, config.hidden_dim)
        # Query boxes, cx cy w h in fractions of the image, initially the whole image; and position embeddings
        self.query_boxes = nn.Parameter(torch.tensor([0.5, 0.5, 1.0, 1.0]).repeat(config.num_queries, 1))
        if config.position_embedding:
            self.query_position = nn.Parameter(torch.randn(config.num_queries, config.hidden_dim))
        # Stages, with equal initial weights; the last layers of the class heads are separate, for fine-tuning
        stage, class_head = Stage(config), nn.Linear(config.hidden_dim, config.num_classes)
        reset_stage(stage, class_head)
        self.stages, self.class_heads = clones(stage, config.stages), clones(class_head, config.stages)
        # Mask encoder and decoder, which are not trained
        pca = config.codec == "logit-pca"
        self.codec = LogitPcaCodec(config.mask_size, config.code_length) if pca else FlattenCodec(config.mask_size)

    def prepare(self, targets: Iterable[Instances]) -> None:
        """Fit the mask codec (section 3.1) to the masks of the data, or read it from a file; flattening needs no fit."""
        codec_files.fit_or_load(self.codec, targets, self.config.codec_weights)

    def forward(self, images: ImageBatch) -> ModelOutput:
        """Return, for every stage, class logits [B N K], boxes [B N 4] and mask codes [B N D]."""
        check_canvas(images, self.input.divisor)
        dtype = self.query_boxes.dtype
        box_dtype = torch.promote_types(dtype, torch.float32)  # pixel coordinates need more than 8 or 11 bits
        levels = to_roi_dtype(self.pyramid(self.backbone(images.pixels)), box_dtype)  # strides 4 ... 32; [B C h w]
        objects = self._object_features(levels, images).to(dtype)  # [B N C]
        # Width, height, width, height of each image
        pixels = images.sizes.flip(1).repeat(1, 2)[:, None].to(objects.device, box_dtype)
        boxes = box_ops.to_corners(self.query_boxes.to(box_dtype)) * pixels  # [B N 4], absolute
        layers = []
        for stage, class_head in zip(self.stages, self.class_heads, strict=True):
            assert isinstance(stage, Stage)
            objects = stage.encoder(objects, pyramid_roi_align(levels, boxes, self.config.roi_size).to(dtype))
            moved = apply_deltas(boxes, stage.box_head(objects).to(boxes.dtype))
            fractions = box_ops.to_centers(moved) / pixels
            logits = class_head(stage.class_tower(objects))
            layers.append(SlotPredictions(logits, stage.mask_head(objects), fractions))
            boxes = moved.detach()  # object features keep their gradient
        return ModelOutput(layers)

    def _object_features(self, levels: list[Tensor], images: ImageBatch) -> Float[Tensor, "B N C"]:
        """Return the initial object features: image features P plus position embeddings E."""
        features = levels[0].new_zeros(len(images), self.config.num_queries, self.config.hidden_dim)
        if self.config.image_feature != "none":
            paddings = None
            if self.config.masked_pooling:
                paddings = [images.padding((level.shape[2], level.shape[3])) for level in levels]
            features = features + image_feature(levels, self.config.image_feature, paddings)[:, None]
        return features + self.query_position if self.config.position_embedding else features

    def loss(self, output: ModelOutput, images: ImageBatch, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Return the terms of equation 8 for every stage: class (focal), box_l1, box_giou, mask_code (L2) and mask_dice.

        All are divided by the number of objects, mask_code also by D. Every stage is matched separately. Computed in float32.

        Raises:
            MatchingError: a prediction is NaN or infinite.
        """
        with torch.autocast(images.pixels.device.type, enabled=False):
            return self._terms(output.layers, images, targets)

    def _terms(self, layers: Sequence[SlotPredictions], images: ImageBatch, targets: Sequence[Instances]) -> dict[str, Tensor]:
        settings = self.config
        count = distributed.divisor(sum(len(instances) for instances in targets), like=images.pixels)
        labels = [instances.labels for instances in targets]
        boxes = [box_ops.fractions(instances.boxes, instances.masks.size) for instances in targets]
        masks = pad([crop(instances.masks, instances.boxes, self.codec.size) for instances in targets])  # [B T S S]
        masks = masks.to(images.pixels.device).float()
        codes = torch.stack([layer.mask_params for layer in layers if layer.mask_params is not None]).float()  # [L B N D]
        weights = (settings.class_weight, settings.l1_weight, settings.giou_weight)
        cost = settings.mask_weight * self._mask_cost(codes, masks)
        pairs, sums = match_and_corner_losses(layers, labels, boxes, weights, cost)
        matched, expected = codes[pairs.layer, pairs.image, pairs.slot], masks[pairs.image, pairs.object]
        if settings.mask_losses != "dice":
            errors = (matched - self._encode(expected)).square().mean(1)
            sums["mask_code"] = settings.mask_weight * sum_by_layer(errors, pairs.layer, len(layers))
        if settings.mask_losses != "code":
            errors = squared_dice_loss(self.codec.decode(matched), expected, eps=1e-5)
            sums["mask_dice"] = settings.mask_weight * sum_by_layer(errors, pairs.layer, len(layers))
        return name_by_layer({name: value / count for name, value in sums.items()}, len(layers))

    def _encode(self, masks: Float[Tensor, "n S S"]) -> Float[Tensor, "n D"]:
        """Return target codes; with logit-pca the label smoothing of the pixels is drawn at random at every call."""
        if isinstance(self.codec, LogitPcaCodec):
            return self.codec.encode(masks, noisy=self.config.target_noise)
        return self.codec.encode(masks)

    @torch.no_grad()
    def _mask_cost(self, codes: Float[Tensor, "L B N D"], masks: Float[Tensor, "B T S S"]) -> Float[Tensor, "L B N T"]:
        """Return the mask cost of table 1b (cosine: equation 7) between every slot and every object of its image."""
        if self.config.mask_cost == "none":
            return codes.new_zeros(*codes.shape[:3], masks.shape[1])
        if self.config.mask_cost == "dice":
            drawn = self.codec.decode(codes.flatten(0, 2)).unflatten(0, codes.shape[:3])
            return squared_dice_cost(drawn, masks, eps=1e-5)
        targets = self._encode(masks.flatten(0, 1)).unflatten(0, masks.shape[:2])
        return cosine_cost(codes, targets) if self.config.mask_cost == "cosine" else l1_cost(codes, targets) / codes.shape[3]

    @torch.no_grad()
    def postprocess(
        self,
        output: ModelOutput,
        images: ImageBatch,
        sizes: Sequence[tuple[int, int]],
        limit: int = 100,
        threshold: float = 0.0,
    ) -> list[Instances]:
        """Return the `limit` best pairs of query and class of each image, without those whose box is outside the image.

        A query may appear with several classes. Boxes are clipped to the image, and masks are resized to the clipped boxes.
        """
        last = output.layers[-1]
        assert last.boxes is not None
        assert last.mask_params is not None
        detections = []
        for logits, boxes, codes, size in zip(last.class_logits, last.boxes, last.mask_params, sizes, strict=True):
            slots, labels, scores, corners = top_k_detections_in_image(logits, boxes, size, limit, threshold)
            queries, mask_of = slots.unique(return_inverse=True)  # decode a query once, however many classes it has
            with torch.autocast(codes.device.type, enabled=False):  # rounding would move the masks' edges
                masks = paste_soft(self.codec.decode(codes[queries].float()), corners[queries], size, _MASK_THRESHOLD)
            boxes, masks = corners[slots].cpu(), masks[mask_of.tolist()]
            detections.append(Instances(labels.cpu(), boxes, masks, scores.cpu(), self.categories))
        return detections
