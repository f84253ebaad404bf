"""Maps resized to images: every rule for where a pixel looks, in one place, and masks painted without any map at full size.

A resize is two lists of positions: for every row, and every column, of the result, the place in the source that it shows, in
cells (0 is the centre of the first cell). What lies between cells is linear; what lies outside shows the nearest cell.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from maskset import rle
from maskset.instances import Masks
from maskset.kernels import fields, library, targets
from maskset.kernels.runs import Counts

_CELLS = 2**20  # that lie between two resizes at a time
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
    low, high, near, far = (tap.to(maps.device) for tap in _taps(positions, maps.shape[axis]))
    near, far = (weight.unsqueeze(-1) if axis == -2 else weight for weight in (near, far))
    return maps.index_select(axis, low) * near + maps.index_select(axis, high) * far


def _taps(positions: Positions, cells: int) -> fields.Taps:
    """Return the two cells between which each position lies, and what each of them weighs there."""
    positions = positions.clamp(0, cells - 1)
    low = positions.floor()
    share = positions - low
    return low.long(), (low.long() + 1).clamp(max=cells - 1), 1 - share, share


def stretched(masks: Masks, canvas: tuple[int, int], size: tuple[int, int], device: torch.device) -> Float[Tensor, "T H W"]:
    """Return masks, on a canvas that is zero beyond their image, resized by their corners, with soft borders: SOIT's targets.

    Args:
        masks: of one image.
        canvas: height and width of the padded batch, pixels.
        size: height and width of the result.
        device: where to compute.
    """
    rows, columns = by_corners(canvas[0], size[0]), by_corners(canvas[1], size[1])
    if library.supports(masks.device):
        return targets.mean(masks.view(), _taps(rows, canvas[0]), _taps(columns, canvas[1])).to(device)
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
    steps = _changing(steps, (maps.shape[1], maps.shape[2]))
    resizes = [step for step in steps if isinstance(step, tuple)]
    size = rle.check_size((len(resizes[-1][0]), len(resizes[-1][1])))
    together = library.handle() is not None and isinstance(steps[-1], tuple)
    if together:
        maps = maps.float().cpu()  # the masks are wanted there in any case
    above = (maps > least).view(torch.uint8)  # whose greatest is found ten times as fast as whether there is any
    rows = _windows([step[0] for step in resizes], maps.shape[1], *_spans(above.amax(2)))
    columns = _windows([step[1] for step in resizes], maps.shape[2], *_spans(above.amax(1)))
    if together:
        return Masks(_painted_together(maps.contiguous(), rows, columns, steps, threshold), size)
    each = zip(maps, rows.tolist(), columns.tolist(), strict=True)
    return Masks([_painted(*one, steps, threshold, size) for one in each], size)


def _changing(steps: Sequence[Step], size: tuple[int, int]) -> Sequence[Step]:
    """Return the steps without resizes of maps of `size` that leave every cell where it is; one resize stays in any case."""
    kept: list[Step] = []
    for step in steps:
        if isinstance(step, tuple):
            if all(torch.equal(places, torch.arange(cells).float()) for places, cells in zip(step, size, strict=True)):
                continue
            size = len(step[0]), len(step[1])
        kept.append(step)
    return kept if any(isinstance(step, tuple) for step in kept) else steps


def _painted(
    one: Float[Tensor, "h w"],
    rows: Sequence[Sequence[int]],
    columns: Sequence[Sequence[int]],
    steps: Sequence[Step],
    threshold: float,
    size: tuple[int, int],
) -> Counts:
    """Return the run lengths of one mask."""
    (_, _, top, bottom), (_, _, left, right) = rows[-1], columns[-1]
    if bottom <= top or right <= left:
        return torch.tensor([size[0] * size[1]], dtype=torch.int32)
    window, pieces = one[rows[0][0] : rows[0][1], columns[0][0] : columns[0][1]], iter(zip(rows, columns, strict=True))
    for step in steps:
        if isinstance(step, tuple):
            axes = zip(step, next(pieces), strict=True)
            window = resample(window, *(positions[first:end] - start for positions, (start, _, first, end) in axes))
        else:
            window = step(window)
    return rle.placed(window > threshold, left, top, size).cpu()


def _painted_together(
    maps: Float[Tensor, "n h w"],
    rows: Int[Tensor, "n resizes 4"],
    columns: Int[Tensor, "n resizes 4"],
    steps: Sequence[Step],
    threshold: float,
) -> list[Counts]:
    """Return the run lengths of all masks, as many at a time as memory allows."""
    sizes = ((rows[..., 3] - rows[..., 2]) * (columns[..., 3] - columns[..., 2]))[:, :-1].sum(1)  # between two resizes
    few = (sizes.cumsum(0) // _CELLS).unique_consecutive(return_counts=True)[1].tolist()
    parts = zip(maps.split(few), rows.split(few), columns.split(few), strict=True)
    return [counts for part in parts for counts in _painted_few(*part, steps, threshold)]


def _painted_few(
    maps: Float[Tensor, "n h w"],
    rows: Int[Tensor, "n resizes 4"],
    columns: Int[Tensor, "n resizes 4"],
    steps: Sequence[Step],
    threshold: float,
) -> list[Counts]:
    height, width = maps.shape[1:]
    cells, apart = maps.flatten(), torch.full((len(maps),), width)
    begins = torch.arange(len(maps)) * height * width + rows[:, 0, 0] * width + columns[:, 0, 0]
    pieces = zip(rows.unbind(1), columns.unbind(1), strict=True)
    for step in steps[:-1]:
        if isinstance(step, tuple):
            row, column = next(pieces)
            taps = _taps(step[0], height), _taps(step[1], width)
            cells, begins = fields.resize(cells, fields.parts(begins, apart, row, column), *taps)
            height, width, apart = len(step[0]), len(step[1]), column[:, 3] - column[:, 2]
        else:
            cells = step(cells)
    assert isinstance(steps[-1], tuple)
    taps = _taps(steps[-1][0], height), _taps(steps[-1][1], width)
    return fields.cut(cells, fields.parts(begins, apart, *next(pieces)), *taps, threshold)


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


def _windows(
    steps: Sequence[Positions], cells: int, first: Int[Tensor, "n"], end: Int[Tensor, "n"]
) -> Int[Tensor, "n resizes 4"]:
    """Return what resizes need along an axis so that all pixels are made that see cells `first` up to `end`.

    That is, for each resize: the first cell that it reads and their end, the first pixel that it makes and their end; four
    zeros for those that see none.
    """
    for positions in steps:  # forward: a pixel sees the cells on both sides of its position
        first, end = torch.searchsorted(positions, (first - 1).float(), right=True), torch.searchsorted(positions, end.float())
        end = end.masked_fill(end <= first, 0)
    windows, lengths = [], [cells, *map(len, steps[:-1])]
    for positions, length in zip(reversed(steps), reversed(lengths), strict=True):  # and back
        seen = end > first
        first, end = first * seen, end * seen
        start, stop = positions[first].long() * seen, (positions[end - 1].long() + 2).clamp(max=length) * seen
        windows.append(torch.stack([start, stop, first, end], 1))
        first, end = start, stop
    return torch.stack(windows[::-1], 1)


def _spans(flags: UInt8[Tensor, "n cells"]) -> tuple[Int[Tensor, "n"], Int[Tensor, "n"]]:
    """Return the first cell of each row that is 1 and the end of those, 0 and 0 where there is none; on the CPU."""
    flags = flags.cpu()
    first, behind = flags.argmax(1), flags.flip(1).argmax(1)
    return first, (flags.shape[1] - behind) * flags.amax(1)
