"""The official checkpoints of ISTR of 2022 (hujiecpp/ISTR), here ISTR-SMT, and the rules that rename their entries."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from maskset.conversion.class_names import used_categories
from maskset.conversion.istr import SHARED_RULES, shared_settings, stage_rules
from maskset.conversion.keys import Rule, prefix_rules, rename, require
from maskset.errors import ConversionError
from maskset.systems.istr_smt import IstrSmtConfig

categories = used_categories  # what the class channels stand for
_CODEC = {
    "mask_E.encoder": "codec.encoder",
    "mask_D.decoder.1": "codec.first.0",
    "mask_D.decoder.2": "codec.first.1",
    **{f"mask_D.decoder.{i + 4}.up": f"codec.doublings.{i}" for i in range(4)},
    "mask_D.decoder.8": "codec.last",
}
_CONTEXT_HEAD = {  # two blocks of two convolutions and norms, in one sequence here
    f"ret_roi_layer_{block}.conv.{i}": f"context_head.{6 * (block - 1) + i}" for block in (1, 2) for i in (0, 1, 3, 4)
}
RULES: list[Rule] = [*SHARED_RULES, *stage_rules({"mask_module": "mask_head", **_CONTEXT_HEAD}), *prefix_rules(_CODEC)]


def convert(state: Mapping[str, Tensor], use_last_copy: bool = False) -> tuple[IstrSmtConfig, dict[str, Tensor]]:
    """Return the settings of an official model, read from the shapes of its state dict, and our state dict.

    The entries show the codec: mask_D is the autoencoder, mask_encoding is PCA, neither is DCT.

    Raises:
        ConversionError: an entry is unknown or missing, or it is a checkpoint of 2021.
    """
    if any(".mask_logits." in name for name in state):
        raise ConversionError("this is a checkpoint of the code of 2021, the paper's model: convert it as istr.")
    ours = rename(state, RULES, use_last_copy)
    length, _, size, _ = require(ours, "stages.0.mask_head.6.weight", 4).shape
    settings: dict[str, Any] = {**shared_settings(ours), "mask_size": 16 * size, "code_length": length, "codec": "dct"}
    settings["backbone"] = replace(settings["backbone"], frozen_stages=0)
    settings["averaged_stages"] = min(4, settings["stages"])
    for codec, entry in (("autoencoder", "codec.last.weight"), ("logit-pca", "codec.components")):
        if entry in ours:
            settings["codec"], ours["codec.fitted"] = codec, torch.tensor(True)
    return IstrSmtConfig(**settings), ours
