"""Rename the entries of a state dict by rules that lose nothing."""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from maskset.errors import ConversionError

Rule = tuple[str, str | None]  # a pattern for the whole name, and what it becomes; None: left out on purpose
RESNETS = {6: "resnet50.tv_in1k", 23: "resnet101.tv_in1k"}  # by the number of blocks in the third stage
NUM_HEADS = 8  # the number of attention heads cannot be read off the shapes; all official models have 8
ATTENTION = {  # deformable attention, from the name in Deformable DETR's code and in mmdetection to ours
    "sampling_offsets": "sampling_offsets",
    "attention_weights": "attention_weights",
    "value_proj": "value_projection",
    "output_proj": "output_projection",
}


def rename(state: Mapping[str, Tensor], rules: Sequence[Rule], last_wins: bool = False) -> dict[str, Tensor]:
    """Return every entry under the name that the first fitting rule gives it.

    Official files store modules that are used in several places once for each place. Such aliases get one name here, and
    must hold the same numbers.

    Args:
        state: official names and tensors.
        rules: tried in order.
        last_wins: where aliases differ, take the last one in the order of the file, as loading it officially would.

    Raises:
        ConversionError: a name fits no rule, or aliases differ.
    """
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]
    renamed: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    unknown, different = [], []
    for name, value in state.items():
        fitting = ((matched, replacement) for pattern, replacement in compiled if (matched := pattern.fullmatch(name)))
        matched, replacement = next(fitting, (None, None))
        if matched is None:
            unknown.append(name)
        if matched is None or replacement is None:
            continue
        target = matched.expand(replacement)
        if target in renamed and not torch.equal(renamed[target], value):
            different.append(f"{origin[target]} and {name}")
        renamed[target], origin[target] = value, name
    if unknown:
        raise ConversionError(
            f"entries not known here: {_listed(unknown)}. Is this a checkpoint of another system, or of a variant?"
        )
    if different and not last_wins:
        raise ConversionError(
            f"copies of one tensor differ: {_listed(different)}. Official loading takes the last one: --last-wins does the same."
        )
    return renamed


def rename_known(state: Mapping[str, Tensor], rules: Sequence[Rule]) -> dict[str, Tensor]:
    """Return every entry under the name that the first fitting rule gives it; a name that fits none stays as it is."""

    def new_name(name: str) -> str | None:
        for pattern, replacement in rules:
            if matched := re.fullmatch(pattern, name):
                return None if replacement is None else matched.expand(replacement)
        return name

    return {new: value for name, value in state.items() if (new := new_name(name)) is not None}


def need(state: Mapping[str, Tensor], name: str, dims: int) -> Tensor:
    """Return an entry with `dims` dimensions, or raise a ConversionError that names it."""
    if name not in state:
        raise ConversionError(f"there is no entry for our {name}. Is this a checkpoint of another system, or of a variant?")
    if state[name].dim() != dims:
        raise ConversionError(f"the entry for our {name} has the shape {list(state[name].shape)}, expected {dims} dimensions.")
    return state[name]


def proposal_class_head(state: Mapping[str, Tensor], decoder_layers: int) -> dict[str, Tensor]:
    """Return our state dict with the class head that comes after those of the decoder layers under its name."""
    last = f"class_heads.{decoder_layers}."
    return {name.replace(last, "proposal_class_head.") if name.startswith(last) else name: state[name] for name in state}


def count(state: Mapping[str, Tensor], pattern: str) -> int:
    """Return how many different numbers the group of a pattern matches among the names: the number of layers, say."""
    return len({matched.group(1) for name in state if (matched := re.match(pattern, name))})


def resnet_name(state: Mapping[str, Tensor]) -> str:
    """Return which ResNet our state dict holds, by the number of blocks in its third stage.

    Raises:
        ConversionError: neither ResNet-50 nor ResNet-101.
    """
    blocks = count(state, r"backbone\.body\.layer3\.(\d+)\.")
    if blocks not in RESNETS:
        raise ConversionError(f"the backbone is none of {', '.join(RESNETS.values())}: its third stage has {blocks} blocks.")
    return RESNETS[blocks]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
