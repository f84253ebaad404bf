"""Maps resized to images: every rule for where a pixel looks, in one place, and masks painted without any map at full size.

A resize is two lists of positions: for every row, and every column, of the result, the place in the source that it shows, in
cells (0 is the centre of the first cell). What lies between cells is linear; what lies outside shows the nearest cell.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from maskset import rle
from maskset.structures import Masks

Positions = Float[Tensor, "_"]
Step = tuple[Positions, Positions] | Callable[[Tensor], Tensor]  # a resize (rows, columns), or a function of each value


def by_corners(source: int, target: int) -> Positions:
    """Return positions that put the first and the last cell at the first and the last pixel ("align_corners")."""
    if target == 1:
        return torch.zeros(1)
    return torch.arange(target, dtype=torch.float32) * ((source - 1) / (target - 1))


def by_centres(source: int, target: int) -> Positions:
    """Return positions that put the borders of the source at the borders of the result (half-pixel convention)."""
    return ((torch.arange(target, dtype=torch.float32) + 0.5) * (source / target) - 0.5).clamp(0, source - 1)


def by_factor(source: int, factor: int) -> Positions:
    """Return positions of CondInst's aligned upsampling: pixel i shows cell (i - factor / 2) / factor."""
    return ((torch.arange(source * factor, dtype=torch.float32) - factor // 2) / factor).clamp(0, source - 1)


def resample(maps: Float[Tensor, "*n h w"], rows: Float[Tensor, "H"], columns: Float[Tensor, "W"]) -> Float[Tensor, "*n H W"]:
    """Return the maps at the given positions, bilinearly."""
    return _along(_along(maps, rows, -2), columns, -1)


def _along(maps: Tensor, positions: Positions, axis: int) -> Tensor:
    positions = positions.to(maps.device).clamp(0, maps.shape[axis] - 1)
    low = positions.floor().long()
    high = (low + 1).clamp(max=maps.shape[axis] - 1)
    share = (positions - low).unsqueeze(-1) if axis == -2 else positions - low
    return maps.index_select(axis, low) * (1 - share) + maps.index_select(axis, high) * share


def stretched(masks: Masks, canvas: tuple[int, int], size: tuple[int, int], device: torch.device) -> Float[Tensor, "T H W"]:
    """Return masks, on a canvas that is zero beyond their image, resized by their corners, with soft borders: SOIT's targets.

    Args:
        masks: of one image.
        canvas: height and width of the padded batch, pixels.
        size: height and width of the result.
        device: where to compute.
    """
    rows, columns = by_corners(canvas[0], size[0]), by_corners(canvas[1], size[1])
    soft = torch.zeros(len(masks), *size, device=device)
    for i in range(len(masks)):  # one full-size mask at a time
        dense = masks[i].dense().to(device)
        padded = F.pad(dense, (0, canvas[1] - dense.shape[2], 0, canvas[0] - dense.shape[1])).float()
        soft[i] = resample(padded, rows, columns)[0]
    return soft


def paint(maps: Float[Tensor, "n h w"], steps: Sequence[Step], least: float, threshold: float = 0.5) -> Masks:
    """Return where each map, after all steps, exceeds a threshold.

    A pixel between cells that are all too low stays too low, so each map is cut to the cells above `least` before it is
    resized: the work and the memory are those of the objects, not of the image.

    Args:
        maps: one for each object.
        steps: resizes and functions of single values (such as the sigmoid), in order; the last resize gives the image's size.
        least: a value of `maps` that the threshold cannot be reached from.
        threshold: what a pixel must exceed.
    """
    resizes = [step for step in steps if isinstance(step, tuple)]
    size = (len(resizes[-1][0]), len(resizes[-1][1]))
    above = maps > least
    spans = torch.stack([*_spans(above.any(2)), *_spans(above.any(1))], 1).tolist()  # one copy to the host for all objects
    counts = []
    for one, (top, bottom, left, right) in zip(maps, spans, strict=True):
        rows = _windows([step[0] for step in resizes], maps.shape[1], top, bottom)
        columns = _windows([step[1] for step in resizes], maps.shape[2], left, right)
        if rows is None or columns is None:
            counts.append(torch.tensor([size[0] * size[1]], dtype=torch.int32))
            continue
        window = one[rows[0].source, columns[0].source]
        pieces = iter(zip(rows, columns, strict=True))
        for step in steps:
            if isinstance(step, tuple):
                row, column = next(pieces)
                window = resample(window, row.positions, column.positions)
            else:
                window = step(window)
        counts.append(rle.placed(window > threshold, columns[-1].first, rows[-1].first, size).cpu())
    return Masks(counts, size)


def paint_probabilities(maps: Float[Tensor, "n h w"], stride: int, shown: Sequence[int], size: tuple[int, int]) -> Masks:
    """Return where maps of probabilities, drawn on a whole canvas, exceed one half: ISDA's and SOTR's masks of an image.

    Args:
        maps: one for each object.
        stride: pixels of the canvas per cell, to which the maps are resized first.
        shown: height and width of what the image covers of the canvas, which is cut out then, pixels.
        size: height and width of the image, to which that is resized.
    """
    rows, columns = (by_centres(cells, cells * stride)[:pixels] for cells, pixels in zip(maps.shape[1:], shown, strict=True))
    steps = [(rows, columns), (by_centres(len(rows), size[0]), by_centres(len(columns), size[1]))]
    return paint(maps, steps, least=0.5, threshold=0.5)


@dataclass(frozen=True)
class _Window:
    """What a resize needs along one axis to make the part of its result that matters.

    Attributes:
        source: the cells it reads.
        positions: of the part of the result, in cells from the first one that is read.
        first: where that part begins in the whole result.
    """

    source: slice
    positions: Positions
    first: int


def _windows(steps: Sequence[Positions], cells: int, first: int, end: int) -> list[_Window] | None:
    """Return what each resize needs so that all pixels are made that see cells `first` up to `end`; None if none does."""
    for positions in steps:  # forward: a pixel sees the cells on both sides of its position
        first = int(torch.searchsorted(positions, first - 1, right=True))
        end = int(torch.searchsorted(positions, end))
        if end <= first:
            return None
    windows = []
    for positions, length in zip(
        reversed(steps), [*(len(step) for step in reversed(steps[:-1])), cells], strict=True
    ):  # and back
        start, stop = int(positions[first]), min(int(positions[end - 1]) + 2, length)
        windows.append(_Window(slice(start, stop), positions[first:end] - start, first))
        first, end = start, stop
    return windows[::-1]


def _spans(any_above: Bool[Tensor, "n cells"]) -> tuple[Int[Tensor, "n"], Int[Tensor, "n"]]:
    """Return the first true cell of each row and the end of the true ones, 0 and 0 where there is none."""
    flags = any_above.int()
    first, behind = flags.argmax(1), flags.flip(1).argmax(1)
    return first, (flags.shape[1] - behind) * flags.amax(1)
