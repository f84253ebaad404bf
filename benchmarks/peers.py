"""Systems of other packages behind maskset's interface, so that images, augmentation, input size and evaluator are the same.

Both use a backbone of `maskset.layers.backbone`. Their packages compute the loss, or the results, from images: `forward` does
nothing, `loss` and `postprocess` do everything.
"""

from collections import OrderedDict
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from maskset.config import PositiveInt, config, setting
from maskset.instances import Category, Instances, Masks
from maskset.layers.backbone import Backbone, group_count
from maskset.masks.paint import paint
from maskset.masks.resize import half_pixel
from maskset.recipes.backbones import SCRATCH
from maskset.structures import ImageBatch, ModelOutput
from maskset.systems.base import BackboneConfig, InputConfig, System, SystemConfig

_INPUT = InputConfig(short_side=256, long_side=384, divisor=32)
_PASTED = 32  # masks that are pasted at a time, at the size of the image
_LEAST_SIDE = 0.5  # of a box that Mask R-CNN learns, pixels: it takes the logarithm of the sides


@config
class MaskRcnnConfig(SystemConfig):
    """Settings of torchvision's Mask R-CNN, with narrow heads, and anchors for small objects."""

    system: Literal["mask-rcnn"] = "mask-rcnn"
    input: InputConfig = _INPUT
    backbone: BackboneConfig = SCRATCH
    width: PositiveInt = setting(128, "channels of the feature pyramid and of the mask head")
    box_width: PositiveInt = setting(256, "channels of the box head")
    anchor_sizes: tuple[PositiveInt, ...] = setting((8, 16, 32, 64, 128), "sides of the anchors at each level, pixels")
    proposals: PositiveInt = setting(500, "proposals of an image")
    box_samples: PositiveInt = setting(256, "proposals of an image that the box head learns from")
    detections: PositiveInt = setting(300, "maximum number of detections of an image")

    def build(self, categories: tuple[Category, ...]) -> "MaskRcnn":
        """Return an untrained model."""
        return MaskRcnn(self, categories)


class Pyramid(FeaturePyramidNetwork):
    """A feature pyramid at strides 4 to 64 with group norm."""

    def __init__(self, channels: list[int], width: int) -> None:
        super().__init__(channels, width, LastLevelMaxPool(), lambda channels: nn.GroupNorm(group_count(channels), channels))
        self.out_channels = width  # type: ignore[assignment]


class MaskRcnn(System):
    """Mask R-CNN (He et al., ICCV 2017) of torchvision."""

    config: MaskRcnnConfig

    def __init__(self, config: MaskRcnnConfig, categories: tuple[Category, ...]) -> None:
        super().__init__(config, categories, num_slots=config.detections)
        width, channels = config.width, config.num_classes + 1  # channel 0 is the background
        self.backbone = config.backbone.build(finest=4)
        self.pyramid = Pyramid(self.backbone.channels, width)
        sizes = tuple((size,) for size in config.anchor_sizes)
        network = MaskRCNN(
            self.pyramid,
            rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
            rpn_pre_nms_top_n_train=2 * config.proposals,
            rpn_pre_nms_top_n_test=2 * config.proposals,
            rpn_post_nms_top_n_train=config.proposals,
            rpn_post_nms_top_n_test=config.proposals,
            box_head=TwoMLPHead(width * 7 * 7, config.box_width),
            box_predictor=FastRCNNPredictor(config.box_width, channels),
            box_batch_size_per_image=config.box_samples,
            box_detections_per_img=config.detections,
            box_score_thresh=0.0,  # as for the other systems, each image has as many detections as count
            mask_head=MaskRCNNHeads(width, (width,) * 4, 1),
            mask_predictor=MaskRCNNPredictor(width, width, channels),
        )
        self.rpn, self.roi_heads = network.rpn, network.roi_heads

    def forward(self, images: ImageBatch) -> ModelOutput:
        """Return nothing, see the head of the file."""
        return ModelOutput([])

    def loss(self, output: ModelOutput, images: ImageBatch, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Return the terms of torchvision's loss."""
        return self._compute(images, [self._target(objects, images.pixels.device) for objects in targets])[1]

    @torch.no_grad()
    def postprocess(
        self,
        output: ModelOutput,
        images: ImageBatch,
        sizes: Sequence[tuple[int, int]],
        limit: int = 100,
        threshold: float = 0.0,
    ) -> list[Instances]:
        """Return the detections of each image; boxes and masks are scaled to its size first, as torchvision does."""
        self.roi_heads.detections_per_img = min(limit, self.num_slots)  # type: ignore[assignment]
        results = []
        for pixels, valid, size in zip(images.pixels, images.sizes, sizes, strict=True):
            # One image at a time: the maps of the mask head take as much memory as the detections of all.
            (detections,), _ = self._compute(ImageBatch(pixels[None], valid[None]))
            best = detections["scores"] >= threshold
            scale = (torch.tensor(size, device=pixels.device) / valid.to(pixels.device)).flip(0).repeat(2)
            boxes, soft = detections["boxes"][best] * scale, detections["masks"][best]
            parts = zip(soft.split(_PASTED), boxes.split(_PASTED), strict=True)
            masks = [Masks.from_dense(paste_masks_in_image(*part, size)[:, 0] > 0.5) for part in parts]
            labels, scores = detections["labels"][best] - 1, detections["scores"][best]
            results.append(Instances(labels, boxes, Masks.cat([Masks([], size), *masks]), scores, self.categories))
        return results

    def _compute(self, images: ImageBatch, targets: Any = None) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Return detections, and the terms of the loss in training."""
        inputs = ImageList(images.pixels, [(height, width) for height, width in images.sizes.tolist()])
        maps = self.pyramid(OrderedDict((str(level), x) for level, x in enumerate(self.backbone(images.pixels))))
        proposals, proposal_terms = self.rpn(inputs, maps, targets)
        detections, terms = self.roi_heads(maps, proposals, inputs.image_sizes, targets)
        return detections, {**proposal_terms, **terms}

    @staticmethod
    def _target(objects: Instances, device: torch.device) -> dict[str, Tensor]:
        sides = objects.boxes[:, 2:] - objects.boxes[:, :2]
        objects = objects[(sides > _LEAST_SIDE).all(1)]
        target = {"boxes": objects.boxes, "labels": objects.labels + 1, "masks": objects.masks.dense().byte()}
        return {name: value.to(device) for name, value in target.items()}


@config
class Mask2FormerConfig(SystemConfig):
    """Settings of transformers' Mask2Former. The sizes are those of the small recipes."""

    system: Literal["mask2former"] = "mask2former"
    input: InputConfig = _INPUT
    backbone: BackboneConfig = SCRATCH
    width: PositiveInt = setting(128, "channels of the pixel decoder, the transformer decoder and the mask features")
    heads: PositiveInt = setting(4, "attention heads")
    feedforward: PositiveInt = setting(512, "channels between the two layers of a feed-forward network")
    encoder_layers: PositiveInt = setting(1, "layers of deformable attention in the pixel decoder")
    decoder_layers: PositiveInt = setting(3, "layers of the transformer decoder")
    queries: PositiveInt = setting(300, "queries")
    points: PositiveInt = setting(784, "points of a mask in the loss; officially 12,544, for maps with 16 times the cells")

    def build(self, categories: tuple[Category, ...]) -> "Mask2Former":
        """Return an untrained model."""
        return Mask2Former(self, categories)


class Encoder(nn.Module):
    """A backbone in the interface of transformers."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, pixels: Tensor) -> SimpleNamespace:
        """Return the maps."""
        return SimpleNamespace(feature_maps=self.backbone(pixels))


class Mask2Former(System):
    """Mask2Former (Cheng et al., CVPR 2022) of transformers."""

    BACKBONE_PARTS = ("backbone",)

    def __init__(self, config: Mask2FormerConfig, categories: tuple[Category, ...]) -> None:
        super().__init__(config, categories, num_slots=config.queries)
        import transformers

        transformers.logging.set_verbosity_error()  # it warns of backbones other than Swin
        backbone = config.backbone.build(finest=4)
        stages = [f"stage{number}" for number in range(1, 5)]
        like = {"model_type": "resnet", "hidden_sizes": backbone.channels, "depths": [1] * 4, "out_features": stages}
        settings: dict[str, Any] = {
            "backbone_config": like,  # has maps of the same widths, and is replaced
            "num_labels": config.num_classes,
            "feature_size": config.width,
            "mask_feature_size": config.width,
            "hidden_dim": config.width,
            "num_attention_heads": config.heads,
            "encoder_feedforward_dim": config.feedforward,
            "dim_feedforward": config.feedforward,
            "encoder_layers": config.encoder_layers,
            "decoder_layers": config.decoder_layers + 1,  # it counts the prediction before the first layer
            "num_queries": config.queries,
            "train_num_points": config.points,
        }
        self.network = transformers.Mask2FormerForUniversalSegmentation(transformers.Mask2FormerConfig(**settings))
        self.network.model.pixel_level_module.encoder = Encoder(backbone)

    @property
    def backbone(self) -> Backbone:
        """The backbone, whose ImageNet weights training loads."""
        return self.network.model.pixel_level_module.encoder.backbone

    def forward(self, images: ImageBatch) -> ModelOutput:
        """Return nothing, see the head of the file."""
        return ModelOutput([])

    def loss(self, output: ModelOutput, images: ImageBatch, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Return the loss of transformers, whose masks cover the whole canvas."""
        pixels = images.pixels
        masks = [pixels.new_zeros(len(objects), *pixels.shape[2:]) for objects in targets]
        for canvas, objects in zip(masks, targets, strict=True):
            height, width = objects.masks.size
            canvas[:, :height, :width] = objects.masks.dense()
        labels = [objects.labels.to(pixels.device) for objects in targets]
        return {"mask2former": self.network(pixels, mask_labels=masks, class_labels=labels).loss.squeeze()}

    @torch.no_grad()
    def postprocess(
        self,
        output: ModelOutput,
        images: ImageBatch,
        sizes: Sequence[tuple[int, int]],
        limit: int = 100,
        threshold: float = 0.0,
    ) -> list[Instances]:
        """Return the detections of each image as officially: the highest pairs of query and class.

        A score is the probability of the class times the mean of the mask's probabilities, here over the cells of its map.
        """
        predictions, results, stride = self.network(images.pixels), [], 4
        probabilities = predictions.class_queries_logits.softmax(2)[..., :-1]
        for scores, maps, valid, size in zip(
            probabilities, predictions.masks_queries_logits, images.sizes.tolist(), sizes, strict=True
        ):
            positive = maps[:, : -(-valid[0] // stride), : -(-valid[1] // stride)]
            inside = positive > 0
            quality = (positive.sigmoid() * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)
            best = (scores * quality[:, None]).flatten().sort(descending=True)
            values, order = best.values[best.values >= threshold][:limit], best.indices[best.values >= threshold][:limit]
            queries, labels = order // scores.shape[1], order % scores.shape[1]
            canvas = [half_pixel(cells, cells * stride)[:pixels] for cells, pixels in zip(maps.shape[1:], valid, strict=True)]
            image = [half_pixel(len(axis), pixels) for axis, pixels in zip(canvas, size, strict=True)]
            masks = paint(maps[queries], [(canvas[0], canvas[1]), (image[0], image[1])], cutoff=0.0, threshold=0.0)
            results.append(Instances(labels, masks.boxes().to(labels.device), masks, values, self.categories))
        return results


PEERS: dict[str, type[MaskRcnnConfig] | type[Mask2FormerConfig]] = {"mask-rcnn": MaskRcnnConfig, "mask2former": Mask2FormerConfig}
