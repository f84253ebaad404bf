"""COCO's numbers: the same as pycocotools, on generated and on real annotations."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from maskset.data.coco import CocoDataset
from maskset.evaluation.average_precision import average_precision
from maskset.structures import Category, Instances, Masks

REAL = Path(__file__).parents[3] / "shared" / "data"
NAMES = "ap ap50 ap75 ap_small ap_medium ap_large ar_1 ar_10 ar ar_small ar_medium ar_large".split()
