"""Fine-tuning: take from other weights what fits, class by class and query by query, and say what was taken.

Three beginnings of a parameter's name have a meaning here: in a tensor called "class_head..." each row stands for a class, in one
called "query_..." each row stands for a slot, and in "proposal_class_head..." the first row stands for any object, the others for
nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from maskset.instances import Category


@dataclass
class Transfer:
    """What became of each tensor of a model, and of those it was given.

    Attributes:
        taken: names of tensors taken whole.
        by_class: names of tensors of which the rows of `classes` were taken.
        classes: names of the classes that both have.
        fresh_classes: names of the classes that start anew.
        by_row: names of tensors of which the first rows were taken, with how many rows there were and are.
        fresh: names of tensors that start anew, and why.
        unused: names of given tensors that the model has no use for.
    """

    taken: list[str] = field(default_factory=list)
    by_class: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    fresh_classes: list[str] = field(default_factory=list)
    by_row: dict[str, tuple[int, int]] = field(default_factory=dict)
    fresh: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"taken whole: {len(self.taken)} tensors"]
        if self.by_class:
            lines.append(f"class by class: {_listed(self.by_class)}")
            lines.append(f"  classes taken: {_listed(self.classes)}")
            lines.append(f"  classes that start anew: {_listed(self.fresh_classes)}")
        lines += [
            f"{'extended' if now > before else 'shortened'}: {name}, {before} -> {now} rows"
            for name, (before, now) in self.by_row.items()
        ]
        if self.fresh:
            lines.append(f"starts anew: {_listed([f'{name} ({why})' for name, why in self.fresh.items()])}")
        if self.unused:
            lines.append(f"left out: {_listed(self.unused)}")
        return "\n".join(lines)


@torch.no_grad()
def transfer(
    model: nn.Module, categories: Sequence[Category], state: dict[str, Tensor], state_categories: Sequence[Category]
) -> Transfer:
    """Copy what fits into a model, in place, and return what was done.

    A tensor fits if name and shape are equal. Rows of class tensors go by the names of the classes. Slots are taken in their
    order; where the model has more, the others keep their start.

    Args:
        model: what is filled.
        categories: what its class rows stand for.
        state: the other weights.
        state_categories: what their class rows stand for.
    """
    old, new = ([category.name for category in listed] for listed in (state_categories, categories))
    done = Transfer(classes=[name for name in new if name in old], fresh_classes=[name for name in new if name not in old])
    own = model.state_dict()
    for name, tensor in own.items():  # these share memory with the model's parameters
        given = state.get(name)
        if given is None:
            done.fresh[name] = "not there"
        elif name.startswith("class_head") and given.shape == (len(old), *tensor.shape[1:]) and len(tensor) == len(new):
            to, of = [new.index(shared) for shared in done.classes], [old.index(shared) for shared in done.classes]
            tensor[to] = given[of].to(tensor)
            done.by_class.append(name)
        elif given.shape == tensor.shape:
            tensor.copy_(given)
            done.taken.append(name)
        elif name.startswith(("query_", "proposal_class_head")) and given.shape[1:] == tensor.shape[1:]:
            count = min(len(given), len(tensor))
            tensor[:count] = given[:count].to(tensor)
            done.by_row[name] = (len(given), len(tensor))
        else:
            done.fresh[name] = f"{list(given.shape)} there, {list(tensor.shape)} here"
    done.unused = [name for name in state if name not in own]
    return done


def _listed(names: Sequence[str], most: int = 8) -> str:
    shown = ", ".join(names[:most])
    return (shown or "none") + (f" and {len(names) - most} more" if len(names) > most else "")
