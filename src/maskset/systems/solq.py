"""SOLQ: Segmenting Objects by Learning Queries (Dong et al., NeurIPS 2021, arXiv:2106.02351).

Each query predicts a class, a box and a mask code, which the paper calls mask vector: D = 256 DCT coefficients of the mask,
cropped to the box and resized to 128 x 128. SOLQ is built on Deformable DETR. From top to bottom this file follows figures 1b
and 2: feature extraction, decoder, unified query representation, then targets, loss and results.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from maskset import boxes as box_ops
from maskset import distributed
from maskset.config import Bounds, Fraction, NonNegativeFloat, PositiveInt, config, setting
from maskset.detection import match_and_box_losses, top_k_detections
from maskset.errors import ConfigError
from maskset.instances import Category, Instances
from maskset.layers.backbone import LevelProjection
from maskset.layers.blocks import Mlp, clones
from maskset.layers.transformer import DecoderLayer, Encoder, Memory, Proposals, flatten_levels, refine, reset_transformer
from maskset.losses import dice_loss, name_by_layer, sum_by_layer
from maskset.masks.codecs import files as codec_files
from maskset.masks.codecs.dct import DctCodec
from maskset.masks.codecs.flatten import FlattenCodec
from maskset.masks.codecs.pca import PcaCodec
from maskset.masks.codecs.sparse import SparseCodec
from maskset.masks.paint import binarize, paste
from maskset.masks.targets import crop
from maskset.structures import ImageBatch, ModelOutput, SlotPredictions
from maskset.systems.base import BackboneConfig, System, SystemConfig, check_canvas, check_codec, check_heads


@config
class SolqConfig(SystemConfig):
    """Settings of SOLQ; the defaults are those of the official ResNet-50 model."""

    system: Literal["solq"] = "solq"
    backbone: BackboneConfig = setting(BackboneConfig(), "the backbone")
    hidden_dim: PositiveInt = setting(384, "width C of the transformer (the paper does not say; the official code has 384)")
    num_heads: PositiveInt = setting(8, "attention heads")
    num_levels: PositiveInt = setting(4, "feature levels, strides 8, 16, 32, 64")
    num_points: PositiveInt = setting(4, "sampling points of an attention head in a level")
    feedforward_dim: PositiveInt = setting(1024, "hidden width of the transformer's MLPs")
    dropout: Fraction = setting(0.1, "dropout in the transformer")
    encoder_layers: PositiveInt = setting(6, "deformable encoder layers")
    decoder_layers: PositiveInt = setting(6, "decoder layers")
    num_queries: PositiveInt = setting(300, "N, number of object queries: the maximum number of objects per image")
    box_refinement: bool = setting(True, "each decoder layer refines the boxes of the previous one, with its own heads")
    two_stage: bool = setting(False, "initialize the queries from the encoder's best proposals")
    codec: Literal["dct", "pca", "sparse", "flatten"] = setting("dct", "Table 3a: mask codec")
    mask_size: PositiveInt = setting(128, "Table 3d: N of the paper, side S of the box-local mask, pixels")
    code_length: PositiveInt = setting(256, "Table 3e: n_k of the paper, D numbers for a mask")
    codec_weights: str | None = setting(None, "file of a codec fitted by `maskset codecs fit`; None: fit it, or take --init's")
    mask_hidden_dim: PositiveInt = setting(1024, "hidden width of the mask head")
    mask_loss_layers: int = setting(6, "Table 3c: number of last decoder layers with a mask loss")
    mask_weight: NonNegativeFloat = setting(3.0, "Table 3b: weight of the mask loss")
    class_weight: NonNegativeFloat = setting(2.0, "weight of the focal loss, and in the matching")
    l1_weight: NonNegativeFloat = setting(5.0, "weight of the L1 box loss, and in the matching")
    giou_weight: NonNegativeFloat = setting(2.0, "weight of the generalized IoU loss, and in the matching")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self, "hidden_dim", "num_heads", 4)
        Bounds(1, self.decoder_layers).check("model.mask_loss_layers", self.mask_loss_layers)
        if self.two_stage and not self.box_refinement:
            raise ConfigError("model.two_stage needs model.box_refinement: its queries start from boxes.")
        check_codec(self, fitted=("pca", "sparse"))

    def build(self, categories: tuple[Category, ...]) -> "Solq":
        """Return an untrained SOLQ."""
        return Solq(self, categories)


class Solq(System):
    """The network of figure 1b. See `SolqConfig` for its parts."""

    SLOT_PARTS = ("query_position", "query_content")
    PROPOSAL_PARTS = ("proposal_class_head",)
    FITTED_PARTS = ("codec",)

    config: SolqConfig

    def __init__(self, config: SolqConfig, categories: tuple[Category, ...]) -> None:
        super().__init__(config, categories, num_slots=config.num_queries)
        width, deformable = config.hidden_dim, (config.num_heads, config.num_levels, config.num_points)
        # Feature extraction
        self.backbone = config.backbone.build()
        self.project = LevelProjection(self.backbone.channels, width, config.num_levels)
        self.level_embedding = nn.Parameter(torch.randn(config.num_levels, width))
        self.encoder = Encoder(config.encoder_layers, width, *deformable, config.feedforward_dim, config.dropout)
        # Object queries: position embeddings, which give the first reference points, and initial states
        if config.two_stage:
            self.proposals = Proposals(width)
        else:
            self.query_position = nn.Parameter(torch.randn(config.num_queries, width))
            self.query_content = nn.Parameter(torch.randn(config.num_queries, width))
            self.reference_points = nn.Linear(width, 2)
        self.decoder = nn.ModuleList(
            DecoderLayer(width, *deformable, config.feedforward_dim, config.dropout) for _ in range(config.decoder_layers)
        )
        # Unified query representation (figure 2): class, box and mask code from the same hidden state
        heads = config.decoder_layers if config.box_refinement else 1
        self.class_heads = clones(nn.Linear(width, config.num_classes), heads)
        self.box_heads = clones(Mlp(width, width, width, 4), heads + config.two_stage)
        if config.two_stage:
            self.proposal_class_head = copy.deepcopy(self.class_heads[0])  # channel 0 is objectness
        self.mask_head = Mlp(width, config.mask_hidden_dim, config.mask_hidden_dim, config.code_length)
        self.codec = _codec(config)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """Initialize as the official code does. Backbone and projection initialize themselves."""
        reset_transformer(self.encoder, self.decoder, self.proposals if self.config.two_stage else self.reference_points)
        if not self.config.two_stage:
            nn.init.zeros_(self.reference_points.bias)
        for class_head in (*self.class_heads, *([self.proposal_class_head] if self.config.two_stage else [])):
            assert isinstance(class_head, nn.Linear)
            nn.init.constant_(class_head.bias, -math.log(99))  # every class starts at a probability of 0.01
        for i, box_head in enumerate(self.box_heads):
            assert isinstance(box_head, Mlp)
            nn.init.zeros_(box_head.last.weight)
            nn.init.zeros_(box_head.last.bias)
            if i == 0 and not self.config.two_stage:  # proposals have a size of their own
                nn.init.constant_(box_head.last.bias[2:], -2.0)  # first boxes start at a side of 0.12
        nn.init.zeros_(self.mask_head.last.weight)
        nn.init.zeros_(self.mask_head.last.bias)
        if self.config.codec == "dct":
            nn.init.constant_(self.mask_head.last.bias[2:], -2.0)  # meant for boxes, but part of the official recipe

    def prepare(self, targets: Iterable[Instances]) -> None:
        """Fit the codec to the masks of the data, or read it from a file; DCT and flattening need no fit."""
        codec_files.fit_or_load(self.codec, targets, self.config.codec_weights)

    def forward(self, images: ImageBatch) -> ModelOutput:
        """Return, for every decoder layer, class logits [B N K], boxes [B N 4] and mask codes [B N D]."""
        check_canvas(images, self.input.divisor)
        levels = self.project(self.backbone(images.pixels))  # strides 8, 16, 32, 64; each [B C h w]
        paddings = [images.padding((level.shape[2], level.shape[3])) for level in levels]
        memory = self.encoder(flatten_levels(levels, paddings, self.level_embedding))
        position, content, reference, proposals = self._queries(memory)
        layers = []
        for i, layer in enumerate(self.decoder):
            content = layer(content, position, reference, memory)  # [B N C]
            class_head, box_head = (heads[min(i, len(self.class_heads) - 1)] for heads in (self.class_heads, self.box_heads))
            boxes = refine(box_head(content).float(), reference)
            layers.append(SlotPredictions(class_head(content), self.mask_head(content), boxes))
            if self.config.box_refinement:
                reference = boxes.detach()
        return ModelOutput(layers, proposals=proposals)

    def _queries(self, memory: Memory) -> tuple[Tensor, Tensor, Tensor, SlotPredictions | None]:
        """Return position, content and reference of the queries, and with two stages the proposals that they start from.

        Two stages, where the cells of highest objectness become queries, were used for no published number.
        """
        if self.config.two_stage:
            proposals, best = self.proposals(memory, self.proposal_class_head, self.box_heads[-1], self.config.num_queries)
            position, content = self.proposals.queries(best)
            return position, content, best.sigmoid(), proposals
        batch = len(memory.cells)
        position = self.query_position.expand(batch, -1, -1)
        return position, self.query_content.expand(batch, -1, -1), self.reference_points(position).float().sigmoid(), None

    def loss(self, output: ModelOutput, images: ImageBatch, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Return the terms of equation 5 for every layer: class (focal), box_l1, box_giou and mask_code (L1).

        Class and box terms are divided by the number of objects, mask_code by the number of matched pairs times D. Both numbers
        are means over processes; the official code counts the pairs on each GPU. Computed in float32.
        """
        with torch.autocast(images.pixels.device.type, enabled=False):
            return self._terms(output, images, targets)

    def _terms(self, output: ModelOutput, images: ImageBatch, targets: Sequence[Instances]) -> dict[str, Tensor]:
        object_divisor = distributed.divisor(sum(len(instances) for instances in targets), like=images.pixels)
        labels = [instances.labels for instances in targets]
        boxes = [box_ops.fractions(instances.boxes, instances.masks.size) for instances in targets]
        target_codes = self._target_codes(targets, images.pixels.device)
        terms = self._layer_terms(output.layers, labels, boxes, target_codes, object_divisor)
        if output.proposals is not None:  # the first stage only separates objects from background
            objectness = [torch.zeros_like(label) for label in labels]
            first = self._layer_terms([output.proposals], objectness, boxes, None, object_divisor)
            terms |= {f"{name}/proposals": term for name, term in first.items()}
        return terms

    def _layer_terms(
        self,
        layers: Sequence[SlotPredictions],
        labels: Sequence[Int[Tensor, "_"]],
        boxes: Sequence[Float[Tensor, "_ 4"]],
        target_codes: Float[Tensor, "M D"] | None,
        object_divisor: Tensor,
    ) -> dict[str, Tensor]:
        """Return the weighted terms of all layers. `target_codes` are those of all objects, in the order of the images."""
        settings = self.config
        weights = (settings.class_weight, settings.l1_weight, settings.giou_weight)
        pairs, sums = match_and_box_losses(layers, labels, boxes, weights)
        terms = {name: value / object_divisor for name, value in sums.items()}
        if target_codes is not None:
            starts = torch.tensor([0, *(len(label) for label in labels[:-1])], device=target_codes.device).cumsum(0)
            predicted = torch.stack([layer.mask_params for layer in layers if layer.mask_params is not None]).float()
            expected = target_codes[starts[pairs.image] + pairs.object]
            errors = self._code_loss(predicted[pairs.layer, pairs.image, pairs.slot], expected)
            pairs_per_layer = distributed.divisor(len(pairs) / len(layers), like=errors)
            by_layer = settings.mask_weight * sum_by_layer(errors, pairs.layer, len(layers)) / pairs_per_layer
            terms["mask_code"] = by_layer[-settings.mask_loss_layers :]
        return name_by_layer(terms, len(layers))

    def _target_codes(self, targets: Sequence[Instances], device: torch.device) -> Float[Tensor, "M D"]:
        """Return the target mask codes of the objects of all images (section 3.2)."""
        masks = torch.cat([crop(instances.masks, instances.boxes, self.codec.size) for instances in targets])
        return self.codec.encode(masks.to(device).float())

    def _code_loss(self, predicted: Float[Tensor, "M D"], targets: Float[Tensor, "M D"]) -> Float[Tensor, "M"]:
        """Return the mask loss of each pair: mean absolute error; for flat masks squared error and dice (Table 3a)."""
        if self.config.codec == "flatten":
            return (predicted - targets).square().mean(1) + dice_loss(predicted.clamp(0, 1), targets)
        return (predicted - targets).abs().mean(1)

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

        Boxes are clipped to the image after the masks are pasted into them; the official code does not clip boxes.
        """
        last = output.layers[-1]
        assert last.boxes is not None
        assert last.mask_params is not None
        detections = []
        for logits, boxes, codes, size in zip(last.class_logits, last.boxes, last.mask_params, sizes, strict=True):
            slots, labels, scores = top_k_detections(logits, limit, threshold)
            corners = box_ops.to_corners(boxes).float() * box_ops.scale_of(size, boxes)
            queries, mask_of = slots.unique(return_inverse=True)  # decode a query once, however many classes it has
            with torch.autocast(codes.device.type, enabled=False):  # rounding would move the masks' edges
                masks = paste(binarize(self.codec.decode(codes[queries].float())), corners[queries], size)
            inside = box_ops.clip(corners[slots], size).cpu()
            detections.append(Instances(labels.cpu(), inside, masks[mask_of.tolist()], scores.cpu(), self.categories))
        return detections


def _codec(config: SolqConfig) -> DctCodec | PcaCodec | SparseCodec | FlattenCodec:
    """Return the codec that the config names; Table 3a compares them."""
    if config.codec == "flatten":
        return FlattenCodec(config.mask_size)
    codecs = {"dct": DctCodec, "pca": PcaCodec, "sparse": SparseCodec}
    return codecs[config.codec](config.mask_size, config.code_length)
