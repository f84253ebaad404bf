"""Fine-tuning: copy the weights that fit from another model, class by class and slot by slot, and report them.

Which tensors have one row per class or per slot is declared by the system: `CLASS_PARTS`, `SLOT_PARTS` and `PROPOSAL_PARTS`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from maskset.instances import Category
from maskset.messages import first_names
from maskset.systems import System
from maskset.systems.base import in_parts


@dataclass
class Transfer:
    """A report on which tensors of a model were copied from other weights.

    Attributes:
        copied: names of tensors that were copied completely.
        by_class: names of tensors of which the rows of `classes` were copied.
        classes: names of the classes that both models have.
        new_classes: names of the classes that only the model has; their rows keep their initial values.
        by_row: names of tensors of which the first rows were copied, with the numbers of rows before and now.
        initial: names of tensors that keep their initial values, and why.
        unused: names of tensors of the other weights that the model does not have.
    """

    copied: list[str] = field(default_factory=list)
    by_class: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    new_classes: list[str] = field(default_factory=list)
    by_row: dict[str, tuple[int, int]] = field(default_factory=dict)
    initial: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"copied completely: {len(self.copied)} tensors"]
        if self.by_class:
            lines.append(f"copied class by class: {first_names(self.by_class)}")
            lines.append(f"  classes in both: {first_names(self.classes)}")
            lines.append(f"  new classes: {first_names(self.new_classes)}")
        lines += [
            f"{'extended' if now > before else 'shortened'}: {name}, {before} -> {now} rows"
            for name, (before, now) in self.by_row.items()
        ]
        if self.initial:
            lines.append(f"not copied: {first_names([f'{name} ({why})' for name, why in self.initial.items()])}")
        if self.unused:
            lines.append(f"not in the model: {first_names(self.unused)}")
        return "\n".join(lines)


@torch.no_grad()
def transfer(
    model: System, categories: Sequence[Category], state: dict[str, Tensor], state_categories: Sequence[Category]
) -> Transfer:
    """Copy the weights that fit into a model, in place, and return a report.

    A tensor fits if name and shape are equal. Rows of class tensors are copied by the names of the classes, rows of slot tensors
    in order; if the model has more slots, the rest keep their initial values.

    Args:
        model: the model to fill.
        categories: the classes of the model.
        state: the other weights.
        state_categories: the classes of the other weights.
    """
    old, new = ([category.name for category in listed] for listed in (state_categories, categories))
    report = Transfer(classes=[name for name in new if name in old], new_classes=[name for name in new if name not in old])
    own = model.state_dict()
    for name, tensor in own.items():  # these share memory with the model's parameters
        source = state.get(name)
        if source is None:
            report.initial[name] = "not in the file"
        elif (
            in_parts(name, model.CLASS_PARTS)
            and source.shape == (len(old), *tensor.shape[1:])
            and tensor.shape[:1] == (len(new),)
        ):
            rows, source_rows = ([names.index(shared) for shared in report.classes] for names in (new, old))
            tensor[rows] = source[source_rows].to(tensor)
            report.by_class.append(name)
        elif source.shape == tensor.shape:
            tensor.copy_(source)
            report.copied.append(name)
        elif in_parts(name, (*model.SLOT_PARTS, *model.PROPOSAL_PARTS)) and source.shape[1:] == tensor.shape[1:]:
            count = min(len(source), len(tensor))
            tensor[:count] = source[:count].to(tensor)
            report.by_row[name] = (len(source), len(tensor))
        else:
            report.initial[name] = f"{list(source.shape)} in the file, {list(tensor.shape)} in the model"
    report.unused = [name for name in state if name not in own]
    return report
