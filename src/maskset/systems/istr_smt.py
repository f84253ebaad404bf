"""ISTR-SMT: the ISTR of 2022 (Hu et al., IEEE TIP 2024, vol. 33, 2895-2907; official code since March 2022).

ISTR with finer masks, of 112 x 112 pixels. As in ISTR, object features refine 300 learned query boxes in six stages. But the mask
code, 256 numbers, is predicted from features that are read again from each refined box, on 28 x 28 cells; the decoder of an
autoencoder draws the mask from the code and from context features of the same cells. From top to bottom: backbone, image
features, stages; then matching and loss, where masks are compared inside the predicted boxes; then results, whose class logits
are means over stages. The parts shared with `istr.py` are in `layers/refinement.py`, `layers/roi.py` and `detection.py`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from maskset import boxes as box_ops
from maskset import distributed
from maskset.config import Bounds, Fraction, NonNegativeFloat, PositiveInt, config, setting
from maskset.detection import Matches, cosine_cost, match_and_corner_losses, pad, top_k_detections_in_image
from maskset.errors import ConfigError, MasksetError
from maskset.instances import Category, Instances
from maskset.layers.backbone import FeaturePyramid
from maskset.layers.blocks import clones
from maskset.layers.refinement import DynamicAttention, RegionEncoder, Tower, apply_deltas, image_feature, reset_stage
from maskset.layers.roi import pyramid_roi_align, to_roi_dtype
from maskset.losses import name_by_layer, squared_dice_loss
from maskset.masks.codecs import files as codec_files
from maskset.masks.codecs.autoencoder import CONTEXT_CHANNELS, AutoencoderCodec
from maskset.masks.codecs.dct import DctCodec
from maskset.masks.codecs.fittable import MAX_SIZE
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
from maskset.tensors import register

_CANVAS = 32  # pixels; on multiples of it each pyramid level is exactly twice as large as the next
_MASK_THRESHOLD = 0.45


@config
class IstrSmtConfig(SystemConfig):
    """Settings of ISTR-SMT; the defaults are those of the official ResNet-50 model."""

    system: Literal["istr-smt"] = "istr-smt"
    input: InputConfig = setting(InputConfig(divisor=_CANVAS), "how images become the network's input")
    backbone: BackboneConfig = setting(BackboneConfig(frozen_stages=0), "the backbone")
    hidden_dim: PositiveInt = setting(256, "width C of pyramid and object features")
    masked_pooling: bool = setting(
        False, "exclude padding from the image feature; officially included, so that results depend on the batch"
    )
    num_queries: PositiveInt = setting(300, "N, number of object queries: the maximum number of objects per image")
    stages: PositiveInt = setting(6, "number of refinement stages")
    averaged_stages: int = setting(4, "number of last stages whose class logits are averaged at inference")
    num_heads: PositiveInt = setting(8, "attention heads")
    roi_size: PositiveInt = setting(7, "side of the grid on which a box's features are read for class and box, cells")
    dynamic_dim: PositiveInt = setting(64, "dynamic attention: width between its two layers")
    feedforward_dim: PositiveInt = setting(2048, "hidden width of the encoders' MLPs")
    dropout: Fraction = setting(0.0, "dropout in the encoders")
    codec: Literal["autoencoder", "dct", "logit-pca"] = setting(
        "autoencoder", "mask codec (SMT, DCT, PCA of the official README)"
    )
    mask_size: PositiveInt = setting(112, "side S of the box-local mask, pixels; its features have a quarter of it, cells")
    code_length: PositiveInt = setting(256, "D numbers for a mask")
    codec_weights: str | None = setting(None, "file of a codec fitted by `maskset codecs fit`; None: fit it, or take --init's")
    autoencoder_steps: PositiveInt = setting(3000, "batches of 64 masks to fit the autoencoder, if no weights are given")
    target_noise: bool = setting(True, "logit-pca: draw the label smoothing of the target pixels at random at every call")
    class_weight: NonNegativeFloat = setting(2.0, "weight of the focal loss, and in the matching")
    l1_weight: NonNegativeFloat = setting(5.0, "weight of the L1 box loss, and in the matching")
    giou_weight: NonNegativeFloat = setting(2.0, "weight of the generalized IoU loss, and in the matching")
    code_weight: NonNegativeFloat = setting(1.0, "weight of the loss of the codes, and of their cosine in the matching")
    dice_weight: NonNegativeFloat = setting(5.0, "weight of the dice loss of the masks")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self, "hidden_dim", "num_heads")
        Bounds(1, self.stages).check("model.averaged_stages", self.averaged_stages)
        if not 32 <= self.mask_size <= MAX_SIZE or self.mask_size % 16:
            raise ConfigError(f"model.mask_size must be a multiple of 16 from 32 to {MAX_SIZE}, got {self.mask_size}.")
        check_codec(self, fitted=("autoencoder", "logit-pca"))
        check_divisor(self, _CANVAS)

    def build(self, categories: tuple[Category, ...]) -> "IstrSmt":
        """Return an untrained ISTR-SMT."""
        return IstrSmt(self, categories)


@dataclass(eq=False)
class StagePredictions(SlotPredictions):
    """Predictions of one stage.

    Attributes:
        mask_context: features of each slot's box, from which the autoencoder decodes the mask together with the code.
    """

    mask_context: Float[Tensor, "B N c s s"] | None = None


register(StagePredictions, ["class_logits", "mask_params", "boxes", "mask_context"])


class Stage(nn.Module):
    """One stage: ISTR's transformer encoder, box head and class head without its last layer, and a convolutional mask head.

    The mask head reads the features of the region, not the object feature. It predicts a code, and for the autoencoder context.
    """

    def __init__(self, config: IstrSmtConfig) -> None:
        super().__init__()
        width, context = config.hidden_dim, CONTEXT_CHANNELS
        attention = DynamicAttention(width, config.dynamic_dim, config.roi_size)
        self.encoder = RegionEncoder(width, config.num_heads, config.feedforward_dim, config.dropout, attention)
        self.class_tower = Tower(width)
        self.box_head = nn.Sequential(Tower(width), nn.Linear(width, 4))
        quarter = [*_convolution(width, width, 4, 2), *_convolution(width, width, 4, 2)]
        self.mask_head = nn.Sequential(*quarter, nn.Conv2d(width, config.code_length, config.mask_size // 16))
        if config.codec == "autoencoder":
            widths = [(width, 2 * context), (2 * context, 2 * context), (2 * context, context), (context, context)]
            self.context_head = nn.Sequential(*(layer for pair in widths for layer in _convolution(*pair, 3, 1)))


def _convolution(before: int, after: int, size: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(before, after, size, stride, padding=1), nn.BatchNorm2d(after), nn.ELU()]


class IstrSmt(System):
    """ISTR with finer features for the mask of each box. See `IstrSmtConfig` for its parts."""

    SLOT_PARTS = ("query_boxes", "query_position")
    FITTED_PARTS = ("codec",)

    config: IstrSmtConfig

    def __init__(self, config: IstrSmtConfig, categories: tuple[Category, ...]) -> None:
        super().__init__(config, categories, num_slots=config.num_queries)
        # Backbone with FPN: P2 ... P5
        self.backbone = config.backbone.build(finest=4)
        self.pyramid = FeaturePyramid(self.backbone.channels, config.hidden_dim)
        # Query boxes, cx cy w h in fractions of the image, initially the whole image; and position embeddings
        self.query_boxes = nn.Parameter(torch.tensor([0.5, 0.5, 1.0, 1.0]).repeat(config.num_queries, 1))
        self.query_position = nn.Parameter(torch.randn(config.num_queries, config.hidden_dim))
        # Stages, with equal initial weights; the last layers of the class heads are separate, for fine-tuning
        stage, class_head = Stage(config), nn.Linear(config.hidden_dim, config.num_classes)
        reset_stage(stage, class_head)
        self.stages, self.class_heads = clones(stage, config.stages), clones(class_head, config.stages)
        # Mask encoder, which is not trained, and decoder, which is trained further only in an autoencoder
        codecs = {"autoencoder": AutoencoderCodec, "dct": DctCodec, "logit-pca": LogitPcaCodec}
        self.codec: AutoencoderCodec | DctCodec | LogitPcaCodec = codecs[config.codec](config.mask_size, config.code_length)

    def prepare(self, targets: Iterable[Instances]) -> None:
        """Fit the codec to the masks of the data, or read it from a file; DCT needs no fit."""
        options = {"steps": self.config.autoencoder_steps} if isinstance(self.codec, AutoencoderCodec) else {}
        codec_files.fit_or_load(self.codec, targets, self.config.codec_weights, **options)

    def forward(self, images: ImageBatch) -> ModelOutput:
        """Return class logits [B N K] and boxes [B N 4] for every stage, codes [B N D] and context [B N c s s].

        In evaluation mode only the last stage has codes and context, since results do not need the others.
        """
        check_canvas(images, self.input.divisor)
        dtype = self.query_boxes.dtype
        box_dtype = torch.promote_types(dtype, torch.float32)  # pixel coordinates need more than 8 or 11 bits
        levels = to_roi_dtype(self.pyramid(self.backbone(images.pixels)), box_dtype)  # strides 4 ... 32; [B C h w]
        paddings = None
        if self.config.masked_pooling:
            paddings = [images.padding((level.shape[2], level.shape[3])) for level in levels]
        objects = (image_feature(levels, "mean", paddings)[:, None] + self.query_position).to(dtype)  # [B N C]
        pixels = images.sizes.flip(1).repeat(1, 2)[:, None].to(objects.device, box_dtype)  # w, h, w, h
        boxes = box_ops.to_corners(self.query_boxes.to(box_dtype)) * pixels  # [B N 4], absolute
        layers = []
        for i, (stage, class_head) in enumerate(zip(self.stages, self.class_heads, strict=True)):
            assert isinstance(stage, Stage)
            objects = stage.encoder(objects, pyramid_roi_align(levels, boxes, self.config.roi_size).to(dtype))
            moved = apply_deltas(boxes, stage.box_head(objects).to(boxes.dtype))
            layer = StagePredictions(class_head(stage.class_tower(objects)), boxes=box_ops.to_centers(moved) / pixels)
            if self.training or i == len(self.stages) - 1:
                layer.mask_params, layer.mask_context = self._masks(stage, levels, moved)
            layers.append(layer)
            boxes = moved.detach()  # object features keep their gradient
        return ModelOutput(layers)

    def _masks(
        self, stage: Stage, levels: Sequence[Float[Tensor, "B C _ _"]], boxes: Float[Tensor, "B N 4"]
    ) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B N c s s"] | None]:
        """Return codes, and context for the autoencoder, from features read again inside the boxes that the stage predicts."""
        regions = pyramid_roi_align(levels, boxes, self.config.mask_size // 4).to(self.query_boxes.dtype)  # [B*N C s s]
        codes = stage.mask_head(regions)[:, :, 0, 0].unflatten(0, boxes.shape[:2])
        if self.config.codec != "autoencoder":
            return codes, None
        return codes, stage.context_head(regions).unflatten(0, boxes.shape[:2])

    def loss(self, output: ModelOutput, images: ImageBatch, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Return five terms for every stage: class (focal), box_l1, box_giou, mask_code (smooth L1) and mask_dice.

        All are divided by the number of objects, mask_code also by D. Every stage is matched separately. Matching compares codes
        of masks cropped to their annotated boxes; the losses compare masks cropped to the predicted boxes. Computed in float32.

        Raises:
            MatchingError: a prediction is NaN or infinite.
            MasksetError: the output was computed in evaluation mode.
        """
        if any(layer.mask_params is None for layer in output.layers):
            raise MasksetError(
                "the loss needs the masks of all stages, which the model only gives in training mode: model.train()."
            )
        with torch.autocast(images.pixels.device.type, enabled=False):
            return self._terms(output.layers, images, targets)

    def _terms(self, layers: Sequence[SlotPredictions], images: ImageBatch, targets: Sequence[Instances]) -> dict[str, Tensor]:
        settings = self.config
        count = distributed.divisor(sum(len(instances) for instances in targets), like=images.pixels)
        labels = [instances.labels for instances in targets]
        boxes = [box_ops.fractions(instances.boxes, instances.masks.size) for instances in targets]
        codes = torch.stack([layer.mask_params for layer in layers if layer.mask_params is not None]).float()  # [L B N D]
        weights = (settings.class_weight, settings.l1_weight, settings.giou_weight)
        cost = settings.code_weight * cosine_cost(codes, self._target_codes(targets, codes.device))
        pairs, sums = match_and_corner_losses(layers, labels, boxes, weights, cost)
        masks = self._masks_in_predicted_boxes(layers, pairs, targets)
        errors = [
            self._mask_errors(layer, *part) for layer, part in zip(layers, _by_layer(pairs, masks, len(layers)), strict=True)
        ]
        code_errors, mask_errors = torch.stack(errors).unbind(1)
        sums |= {"mask_code": settings.code_weight * code_errors, "mask_dice": settings.dice_weight * mask_errors}
        return name_by_layer({name: value / count for name, value in sums.items()}, len(layers))

    def _encode(self, masks: Bool[Tensor, "n S S"]) -> Float[Tensor, "n D"]:
        """Return target codes. In training mode an autoencoder's batch norms use the statistics of these masks."""
        with torch.no_grad():
            if isinstance(self.codec, LogitPcaCodec):
                return self.codec.encode(masks.float(), noisy=self.config.target_noise)
            return self.codec.encode(masks.float())

    def _decode(self, codes: Float[Tensor, "n D"], context: Float[Tensor, "n c s s"] | None) -> Float[Tensor, "n S S"]:
        return self.codec.decode(codes, context) if isinstance(self.codec, AutoencoderCodec) else self.codec.decode(codes)

    def _target_codes(self, targets: Sequence[Instances], device: torch.device) -> Float[Tensor, "B T D"]:
        """Return the codes of the objects' masks, cropped to their annotated boxes."""
        masks = torch.cat([crop(instances.masks, instances.boxes, self.codec.size) for instances in targets]).to(device)
        return pad(list(self._encode(masks).split([len(instances) for instances in targets])))

    @torch.no_grad()
    def _masks_in_predicted_boxes(
        self, layers: Sequence[SlotPredictions], pairs: Matches, targets: Sequence[Instances]
    ) -> Bool[Tensor, "M S S"]:
        """Return the mask of each matched pair's object, cropped to the predicted box, which is clipped to the image."""
        predicted = torch.stack([layer.boxes for layer in layers if layer.boxes is not None])
        corners = box_ops.to_corners(predicted[pairs.layer, pairs.image, pairs.slot])
        rows = torch.cat([corners, pairs.object[:, None]], 1).cpu()  # masks are on the CPU: one copy for all stages
        each_image, crops = rows.split([*pairs.counts] * len(layers)), []
        for image_rows, instances in zip(each_image, [*targets] * len(layers), strict=True):
            size = instances.masks.size
            boxes = box_ops.clip(image_rows[:, :4] * box_ops.scale_of(size, image_rows), size)
            crops.append(crop(instances.masks[image_rows[:, 4].int().tolist()], boxes, self.codec.size))
        return torch.cat(crops).to(corners.device)

    def _mask_errors(self, layer: SlotPredictions, pairs: Matches, masks: Bool[Tensor, "M S S"]) -> Float[Tensor, "2"]:
        """Return the sums over one stage's matched pairs of the code errors, divided by D, and of the mask errors."""
        assert layer.mask_params is not None
        codes, context = layer.mask_params[pairs.image, pairs.slot].float(), _context(layer)
        context = None if context is None else context[pairs.image, pairs.slot].float()
        code_error = F.smooth_l1_loss(codes, self._encode(masks), reduction="sum") / self.codec.length
        mask_error = squared_dice_loss(self._decode(codes, context), masks.float(), eps=1e-5).sum()
        return torch.stack([code_error, mask_error])

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
        mean_logits = torch.stack([layer.class_logits.float() for layer in output.layers[-self.config.averaged_stages :]]).mean(0)
        detections = []
        for i, (logits, boxes, size) in enumerate(zip(mean_logits, last.boxes, sizes, strict=True)):
            slots, labels, scores, corners = top_k_detections_in_image(logits, boxes, size, limit, threshold)
            queries, mask_of = slots.unique(return_inverse=True)  # decode a query once, however many classes it has
            with torch.autocast(logits.device.type, enabled=False):  # rounding would move the masks' edges
                context = _context(last)
                context = None if context is None else context[i, queries].float()
                drawn = self._decode(last.mask_params[i, queries].float(), context)
                masks = paste_soft(drawn, corners[queries], size, _MASK_THRESHOLD)
            boxes, masks = corners[slots].cpu(), masks[mask_of.tolist()]
            detections.append(Instances(labels.cpu(), boxes, masks, scores.cpu(), self.categories))
        return detections


def _context(layer: SlotPredictions) -> Float[Tensor, "B N c s s"] | None:
    return layer.mask_context if isinstance(layer, StagePredictions) else None


def _by_layer(pairs: Matches, masks: Bool[Tensor, "M S S"], layers: int) -> list[tuple[Matches, Bool[Tensor, "_ S S"]]]:
    """Return the pairs and masks of each layer: the statistics of an autoencoder's batch norms are those of one layer."""
    parts = (pairs.layer, pairs.image, pairs.slot, pairs.object, masks)
    by_layer = zip(*(part.split([sum(pairs.counts)] * layers) for part in parts), strict=True)
    return [(Matches(layer, image, slot, target, pairs.counts), own) for layer, image, slot, target, own in by_layer]
