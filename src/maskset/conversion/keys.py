"""Rename the entries of a state dict by rules that lose nothing, and read settings from its shapes."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from maskset.errors import ConversionError
from maskset.messages import first_names

Rule = tuple[str, str | None]  # a pattern for the whole name and its replacement; None: the entry is not needed
RESNETS = {6: "resnet50.tv_in1k", 23: "resnet101.tv_in1k"}  # by the number of blocks in the third stage
PROPOSALS = {  # from the names in Deformable DETR's code and in Opera to ours
    "enc_output": "proposals.output",
    "enc_output_norm": "proposals.output_norm",
    "pos_trans": "proposals.query",
    "pos_trans_norm": "proposals.query_norm",
}
NUM_HEADS = 8  # attention heads of all official models; shapes do not show it


def prefix_rules(names: Mapping[str, str], old: str = "", new: str = "") -> list[Rule]:
    """Return rules that replace the beginning of names.

    Args:
        names: from the official name of a module or tensor to ours; "#" is any number, the same in both.
        old: beginning of all official names.
        new: beginning of all our names.
    """
    rules: list[Rule] = []
    for official, ours in names.items():
        pattern = re.escape(old + official).replace(r"\#", r"(\d+)")
        replacement = (new + ours).replace("#", r"\{}").format(*range(1, 9))  # refers to the numbers as \1, \2 ...
        rest = (old + official).count("#") + 1
        rules.append((rf"{pattern}(\..+)?", rf"{replacement}\{rest}"))
    return rules


def rename(state: Mapping[str, Tensor], rules: Sequence[Rule], use_last_copy: bool = False) -> dict[str, Tensor]:
    """Return every entry under the name that the first matching rule gives it.

    Official files store a module that is used in several places once for each place. Such copies get one name here, and must
    be equal.

    Args:
        state: official names and tensors.
        rules: tried in order.
        use_last_copy: where copies differ, use the last one in the file, as official loading does.

    Raises:
        ConversionError: no rule matches a name, or copies differ.
    """
    compiled = [(re.compile(pattern), replacement) for pattern, replacement in rules]
    renamed: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    unknown, different = [], []
    for name, value in state.items():
        matches = ((match, replacement) for pattern, replacement in compiled if (match := pattern.fullmatch(name)))
        match, replacement = next(matches, (None, None))
        if match is None:
            unknown.append(name)
        if match is None or replacement is None:
            continue
        target = match.expand(replacement)
        if target in renamed and not torch.equal(renamed[target], value):
            different.append(f"{origin[target]} and {name}")
        renamed[target], origin[target] = value, name
    if unknown:
        raise ConversionError(
            f"unknown entries: {first_names(unknown, 5)}. Is this a checkpoint of another system, or of a variant?"
        )
    if different and not use_last_copy:
        raise ConversionError(
            f"copies of one tensor differ: {first_names(different, 5)}. Official loading uses the last, as --use-last-copy does."
        )
    return renamed


def rename_known(state: Mapping[str, Tensor], rules: Sequence[Rule]) -> dict[str, Tensor]:
    """Return every entry under the name that the first matching rule gives it; a name that no rule matches is kept."""

    def new_name(name: str) -> str | None:
        for pattern, replacement in rules:
            if match := re.fullmatch(pattern, name):
                return None if replacement is None else match.expand(replacement)
        return name

    return {new: value for name, value in state.items() if (new := new_name(name)) is not None}


def require(state: Mapping[str, Tensor], name: str, dims: int) -> Tensor:
    """Return an entry with `dims` dimensions, or raise a ConversionError that names it."""
    if name not in state:
        raise ConversionError(
            f"the checkpoint has no tensor for maskset's {name}. Is this a checkpoint of another system, or of a variant?"
        )
    if state[name].dim() != dims:
        raise ConversionError(
            f"the tensor for maskset's {name} has the shape {list(state[name].shape)}, expected {dims} dimensions."
        )
    return state[name]


def split_queries(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return our state dict with the two halves of the official query embedding, "query", as positions and contents."""
    position, content = require(state, "query", 2).tensor_split(2, dim=1)
    rest = {name: value for name, value in state.items() if name != "query"}
    return rest | {"query_position": position.contiguous(), "query_content": content.contiguous()}


def rename_proposal_class_head(state: Mapping[str, Tensor], decoder_layers: int) -> dict[str, Tensor]:
    """Return our state dict with the class head that follows those of the decoder layers as `proposal_class_head`."""
    last = f"class_heads.{decoder_layers}."
    return {name.replace(last, "proposal_class_head.") if name.startswith(last) else name: state[name] for name in state}


def count(state: Mapping[str, Tensor], pattern: str) -> int:
    """Return how many different values the group of a pattern has at the start of names, such as the number of layers."""
    return len({match.group(1) for name in state if (match := re.match(pattern, name))})


def transformer_settings(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the settings of a deformable transformer that the shapes of our state dict show.

    Raises:
        ConversionError: an entry is missing.
    """
    levels, width = require(state, "level_embedding", 2).shape
    samples = require(state, "encoder.layers.0.attention.attention_weights.weight", 2).shape[0]
    return {
        "hidden_dim": width,
        "num_heads": NUM_HEADS,
        "num_levels": levels,
        "num_points": samples // (NUM_HEADS * levels),
        "feedforward_dim": require(state, "encoder.layers.0.feed_forward.up.weight", 2).shape[0],
        "encoder_layers": count(state, r"encoder\.layers\.(\d+)\."),
        "decoder_layers": count(state, r"decoder\.(\d+)\."),
    }


def resnet_name(state: Mapping[str, Tensor], alternatives: Sequence[str] = ()) -> str:
    """Return the name of the ResNet in our state dict, by the number of blocks in its third stage.

    Raises:
        ConversionError: it is neither a ResNet-50 nor a ResNet-101; the message also lists the `alternatives`.
    """
    blocks = count(state, r"backbone\.body\.layer3\.(\d+)\.")
    if blocks not in RESNETS:
        allowed = ", ".join([*RESNETS.values(), *alternatives])
        raise ConversionError(f"the backbone is none of {allowed}: its third stage has {blocks} blocks.")
    return RESNETS[blocks]
