"""Area and centre of mass of masks, from their run lengths alone."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from maskset.instances import Masks


def centres_of_mass(masks: Masks) -> tuple[Int[Tensor, "T"], Float[Tensor, "T 2"]]:
    """Return the number of pixels of each mask, and the mean of their y and x, in pixels (0 is the first pixel's); on the CPU.

    The sums are exact, their quotient is in float32. An empty mask's centre is 0, 0.
    """
    height, runs = masks.size[0], masks.rle()
    moments = torch.zeros(len(runs), 3, dtype=torch.int64)
    if not runs:
        return moments[:, 0], moments[:, 1:].float()
    lengths = torch.cat(runs).cpu().long()  # one copy for all masks
    owner = torch.arange(len(runs)).repeat_interleave(torch.tensor([len(counts) for counts in runs]))
    ends = torch.cat([counts.cumsum(0) for counts in lengths.split([len(counts) for counts in runs])])
    is_set = torch.cat([torch.arange(len(counts)) % 2 == 1 for counts in runs])
    ends, lengths = ends[is_set], lengths[is_set]
    moments.index_add_(0, owner[is_set], _sums_before(ends, height) - _sums_before(ends - lengths, height))
    return moments[:, 0], moments[:, 1:].float() / moments[:, :1].clamp(min=1).float()


def _sums_before(end: Int[Tensor, "n"], height: int) -> Int[Tensor, "n 3"]:
    """Return the count, the sum of y and the sum of x of the first `end` pixels, column by column."""
    columns, rest = end // height, end % height
    of_y = columns * (height * (height - 1) // 2) + rest * (rest - 1) // 2
    of_x = height * (columns * (columns - 1) // 2) + rest * columns
    return torch.stack([end, of_y, of_x], 1)
