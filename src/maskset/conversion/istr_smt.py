"""The official checkpoints of ISTR of 2022 (hujiecpp/ISTR), here ISTR-SMT, and what their names become."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from maskset.conversion.coco import used_categories
from maskset.conversion.istr import SHARED_RULES, STAGE, shared_settings
from maskset.conversion.keys import Rule, need, rename
from maskset.errors import ConversionError
from maskset.systems.istr_smt import IstrSmtConfig

categories = used_categories  # what the class channels stand for
RULES: list[Rule] = [
    *SHARED_RULES,
    (rf"{STAGE}\.mask_module\.(.*)", r"stages.\1.mask_head.\2"),
    *[
        (rf"{STAGE}\.ret_roi_layer_{block}\.conv\.{i}\.(.*)", rf"stages.\1.context_head.{6 * (block - 1) + i}.\2")
        for block in (1, 2)
        for i in (0, 1, 3, 4)
    ],
    (r"mask_E\.(encoder\..*)", r"codec.\1"),
    (r"mask_D\.decoder\.1\.(.*)", r"codec.first.0.\1"),
    (r"mask_D\.decoder\.2\.(.*)", r"codec.first.1.\1"),
    *[(rf"mask_D\.decoder\.{i + 4}\.up\.([12])\.(.*)", rf"codec.doublings.{i}.\1.\2") for i in range(4)],
    (r"mask_D\.decoder\.8\.(.*)", r"codec.last.\1"),
]


def convert(state: Mapping[str, Tensor], last_wins: bool = False) -> tuple[IstrSmtConfig, dict[str, Tensor]]:
    """Return the config that fits an official state dict, read off its shapes, and our state dict.

    Which of the three codes it is, is read off the entries: mask_D is the autoencoder, mask_encoding PCA, neither DCT.

    Raises:
        ConversionError: an entry is unknown or missing, or it is a checkpoint of 2021.
    """
    if any(".mask_logits." in name for name in state):
        raise ConversionError("this is a checkpoint of the code of 2021, the paper's model: convert it as istr.")
    ours = rename(state, RULES, last_wins)
    length, _, size, _ = need(ours, "stages.0.mask_head.6.weight", 4).shape
    settings: dict[str, Any] = {**shared_settings(ours), "mask_size": 16 * size, "code_length": length, "codec": "dct"}
    settings["backbone"] = replace(settings["backbone"], frozen_stages=0)
    settings["averaged_stages"] = min(4, settings["stages"])
    for codec, entry in (("autoencoder", "codec.last.weight"), ("logit-pca", "codec.components")):
        if entry in ours:
            settings["codec"], ours["codec.fitted"] = codec, torch.tensor(True)
    return IstrSmtConfig(**settings), ours
