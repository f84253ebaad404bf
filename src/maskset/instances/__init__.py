"""The objects of one image and their masks."""

from maskset.instances.instances import Category, Instances
from maskset.instances.masks import Masks

__all__ = ["Category", "Instances", "Masks"]
