"""What detectron2 calls the parts of a ResNet with a feature pyramid, and what we do: for ISTR and SOTR."""

from maskset.conversion.keys import Rule
from maskset.layers.detectron2 import RESNET_RULES

RULES: list[Rule] = [
    *[(rf"backbone\.bottom_up\.{old}", f"backbone.body.{new}") for old, new in RESNET_RULES],
    *[
        (rf"backbone\.fpn_{part}{level}\.(weight|bias)", rf"pyramid.{part}.{level - 2}.\1")
        for part in ("lateral", "output")
        for level in (2, 3, 4, 5)
    ],
]
