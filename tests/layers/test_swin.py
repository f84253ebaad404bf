"""The Swin transformer against the official code's arrays, timm's network, and what the paper says of it."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from maskset.layers.swin import (
    SWIN_RULES,
    SWIN_SIZES,
    TIMM_SWIN_RULES,
    DropPath,
    SwinSize,
    SwinTransformer,
    relative_positions,
    rename_swin,
    shift_mask,
    split_windows,
)

GOLDEN = Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
