"""Masks of an image from predictions: pasted from boxes, or painted from maps of the whole image.

| function              | used by        | rule                                                   | C function              |
|-----------------------|----------------|--------------------------------------------------------|-------------------------|
| `binarize`            | SOLQ           | above the middle of the soft mask's range              | none                    |
| `paste`               | SOLQ           | bilinear samples of a binary mask, >= 0.5 (detectron2) | `fields_paste`          |
| `paste_soft`          | ISTR*, Sextant | bilinear samples of probabilities, >= threshold        | `fields_paste`          |
| `paint`               | SOIT           | sigmoid and resizes of logits, > threshold             | `fields_resize`, `_cut` |
| `paint_probabilities` | ISDA, SOTR     | resize by the stride, cut off padding, resize, > 0.5   | by `paint`              |

ISTR* is ISTR and ISTR-SMT. Where the C library is available it does the work, on the CPU (kernels/fields.py,
kernels/csrc/fields.c). The Python code here is the reference that the C code is tested against (tests/kernels/test_fields.py).
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from maskset import rle
from maskset.errors import MasksetError
from maskset.instances import Masks
from maskset.kernels import fields as c_fields
from maskset.kernels import library
from maskset.kernels.runs import Counts
from maskset.masks.resize import Positions, half_pixel, resample, taps

_MAX_CELLS = 2**20  # between two resizes at a time
Step = tuple[Positions, Positions] | Callable[[Tensor], Tensor]  # a resize (rows, columns), or a function of each value


def binarize(soft_masks: Float[Tensor, "n S S"]) -> Bool[Tensor, "n S S"]:
    """Return where each decoded mask exceeds the middle between its minimum and its maximum; a constant mask becomes empty."""
    flat = soft_masks.flatten(1)
    middle = (flat.amax(1) + flat.amin(1)) / 2
    return soft_masks > middle[:, None, None]


def paste(masks: Bool[Tensor, "n S S"], boxes: Float[Tensor, "n 4"], size: tuple[int, int]) -> Masks:
    """Return box-local masks as masks of an image of `size` (height, width).

    A pixel of the image is set where bilinear sampling of the box-local mask at the pixel's center gives at least 0.5, with
    zeros around the mask. Boxes are x0 y0 x1 y1 in pixels; one without area, or not finite, gives an empty mask.
    """
    return paste_soft(masks.float(), boxes, size, 0.5)


def paste_soft(soft_masks: Float[Tensor, "n S S"], boxes: Float[Tensor, "n 4"], size: tuple[int, int], threshold: float) -> Masks:
    """Return box-local soft masks as masks of an image of `size` (height, width): samples that are at least the threshold.

    Soft masks are sampled first and thresholded afterward; `paste` samples masks that are already binary. Only the pixels near a
    box are computed. A soft mask with a value that is not finite gives an empty mask.

    Raises:
        MasksetError: the soft masks are not squares of at least one cell, or there is not one box of four numbers for each.
    """
    height, width = rle.check_pixel_count(size)
    squares = soft_masks.ndim == 3 and soft_masks.shape[1] == soft_masks.shape[2] and soft_masks.shape[1] > 0
    if not squares or boxes.shape != (len(soft_masks), 4):
        raise MasksetError(
            "pasting needs square soft masks [n S S] of at least one cell and a box x0 y0 x1 y1 for each [n 4], "
            f"got shapes {list(soft_masks.shape)} and {list(boxes.shape)}."
        )
    soft_masks, boxes = soft_masks.float(), boxes if boxes.is_floating_point() else boxes.float()
    low, high = soft_masks.amin((1, 2)), soft_masks.amax((1, 2))  # NaN if there is one; faster than isfinite() of all
    boxes = boxes.masked_fill(~(low.isfinite() & high.isfinite())[:, None], 0.0)  # an empty box gives an empty mask
    if library.handle() is not None:  # Fast path: kernels/csrc/fields.c, fields_paste; results of a GPU go to the CPU anyway
        return Masks(c_fields.paste(soft_masks.cpu(), boxes.cpu(), size, threshold), size)
    counts = []
    for soft_mask, (x0, y0, x1, y1) in zip(soft_masks, boxes.tolist(), strict=True):
        # A sample half a cell outside of the box still reads half of the outermost cell, hence the margin.
        left, right = _pixel_range(x0, x1, soft_masks.shape[1], width)
        top, bottom = _pixel_range(y0, y1, soft_masks.shape[1], height)
        if right <= left or bottom <= top:
            counts.append(torch.tensor([height * width], dtype=torch.int32))
            continue
        row_weights = _box_weights(top, bottom, y0, y1, soft_masks.shape[1]).to(soft_mask.device)
        column_weights = _box_weights(left, right, x0, x1, soft_masks.shape[1]).to(soft_mask.device)
        window = row_weights @ soft_mask @ column_weights.T >= threshold
        counts.append(rle.encode_window(window, left, top, size).cpu())
    return Masks(counts, size)


def _pixel_range(low: float, high: float, cells: int, length: int) -> tuple[int, int]:
    """Return first and end of the pixels, out of `length`, whose centers a mask from low to high can reach, or more."""
    if not high > low:
        return 0, 0
    margin = (high - low) / cells + 1
    return int(min(max(low - margin, 0), length)), int(min(max(high + margin, 0), length))


def _box_weights(first: int, end: int, low: float, high: float, cells: int) -> Float[Tensor, "pixels cells"]:
    """Return the weight of each cell of a mask that spans [low, high] in the sample at each pixel's center."""
    centers = torch.arange(first, end, dtype=torch.float32) + 0.5
    position = (centers - low) / (high - low) * cells - 0.5
    return (1 - (position[:, None] - torch.arange(cells, dtype=torch.float32)[None, :]).abs()).clamp(min=0)


def paint_probabilities(maps: Float[Tensor, "n h w"], stride: int, valid_size: Sequence[int], size: tuple[int, int]) -> Masks:
    """Return the masks of where maps of probabilities, predicted for a padded canvas, exceed 0.5 at the size of the image.

    Args:
        maps: one for each object.
        stride: pixels of the canvas per cell; the maps are resized by it first.
        valid_size: height and width of the canvas without padding, pixels; the rest is cut off.
        size: height and width of the image, to which that is resized.
    """
    rows, columns = (half_pixel(cells, cells * stride)[:pixels] for cells, pixels in zip(maps.shape[1:], valid_size, strict=True))
    steps = [(rows, columns), (half_pixel(len(rows), size[0]), half_pixel(len(columns), size[1]))]
    return paint(maps, steps, cutoff=0.5, threshold=0.5)


def paint(maps: Float[Tensor, "n h w"], steps: Sequence[Step], cutoff: float, threshold: float = 0.5) -> Masks:
    """Apply all steps to each map and return its threshold mask.

    A pixel between cells that are all too low is too low, too, so only the part of each map with cells above `cutoff` is
    resized. Work and memory then depend on the objects, not on the image.

    Args:
        maps: one for each object.
        steps: resizes and functions of single values (such as the sigmoid), in order; the last resize gives the image's size.
        cutoff: pixels between cells of at most this value do not exceed the threshold.
        threshold: what a pixel must exceed.
    """
    resizes = [step for step in steps if isinstance(step, tuple)]
    size = rle.check_pixel_count((len(resizes[-1][0]), len(resizes[-1][1])))
    use_c = library.handle() is not None and isinstance(steps[-1], tuple)
    if use_c:
        maps = maps.float().cpu()  # results of a GPU go to the CPU anyway
    above = (maps > cutoff).view(torch.uint8)  # the maximum of bytes is ten times as fast as any()
    rows = _resize_windows([step[0] for step in resizes], maps.shape[1], *_nonzero_ranges(above.amax(2)))
    columns = _resize_windows([step[1] for step in resizes], maps.shape[2], *_nonzero_ranges(above.amax(1)))
    if use_c:  # Fast path: kernels/csrc/fields.c, fields_resize and fields_cut
        return Masks(_paint_in_c(maps.contiguous(), rows, columns, steps, threshold), size)
    windows = zip(maps, rows.tolist(), columns.tolist(), strict=True)
    return Masks([_paint_one(*window, steps, threshold, size) for window in windows], size)


def _paint_one(
    field: Float[Tensor, "h w"],
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
    window, windows = field[rows[0][0] : rows[0][1], columns[0][0] : columns[0][1]], iter(zip(rows, columns, strict=True))
    for step in steps:
        if isinstance(step, tuple):
            axes = zip(step, next(windows), strict=True)
            window = resample(window, *(positions[first:end] - start for positions, (start, _, first, end) in axes))
        else:
            window = step(window)
    return rle.encode_window(window > threshold, left, top, size).cpu()


def _paint_in_c(
    maps: Float[Tensor, "n h w"],
    rows: Int[Tensor, "n resizes 4"],
    columns: Int[Tensor, "n resizes 4"],
    steps: Sequence[Step],
    threshold: float,
) -> list[Counts]:
    """Return the run lengths of all masks, painted by the C library, as many at a time as memory allows."""
    sizes = ((rows[..., 3] - rows[..., 2]) * (columns[..., 3] - columns[..., 2]))[:, :-1].sum(1)  # between two resizes
    chunks = (sizes.cumsum(0) // _MAX_CELLS).unique_consecutive(return_counts=True)[1].tolist()
    counts: list[Counts] = []
    for part, part_rows, part_columns in zip(maps.split(chunks), rows.split(chunks), columns.split(chunks), strict=True):
        height, width = maps.shape[1:]
        cells, row_stride = part.flatten(), torch.full((len(part),), width)
        begins = torch.arange(len(part)) * height * width + part_rows[:, 0, 0] * width + part_columns[:, 0, 0]
        windows = zip(part_rows.unbind(1), part_columns.unbind(1), strict=True)
        for number, step in enumerate(steps, 1):
            if not isinstance(step, tuple):
                cells = step(cells)
                continue
            row, column = next(windows)
            parts, step_taps = c_fields.parts(begins, row_stride, row, column), (taps(step[0], height), taps(step[1], width))
            if number == len(steps):
                counts += c_fields.cut(cells, parts, *step_taps, threshold)
            else:
                cells, begins = c_fields.resize(cells, parts, *step_taps)
                height, width, row_stride = len(step[0]), len(step[1]), column[:, 3] - column[:, 2]
    return counts


def _resize_windows(
    steps: Sequence[Positions], cells: int, first: Int[Tensor, "n"], end: Int[Tensor, "n"]
) -> Int[Tensor, "n resizes 4"]:
    """Return the cells that each resize must read, and the pixels that it must compute, along an axis.

    Args:
        steps: the positions of each resize.
        cells: number of cells of the map.
        first: the first cell of each map that matters.
        end: the end of these cells.

    Returns:
        For each resize the first cell that it reads and their end, the first pixel that it computes and their end; zeros if no
        cell matters.
    """
    for positions in steps:  # forward: a pixel reads the cells on both sides of its position
        first, end = torch.searchsorted(positions, (first - 1).float(), right=True), torch.searchsorted(positions, end.float())
        end = end.masked_fill(end <= first, 0)
    windows, lengths = [], [cells, *map(len, steps[:-1])]
    for positions, length in zip(reversed(steps), reversed(lengths), strict=True):  # and back
        nonempty = end > first
        first, end = first * nonempty, end * nonempty
        start, stop = positions[first].long() * nonempty, (positions[end - 1].long() + 2).clamp(max=length) * nonempty
        windows.append(torch.stack([start, stop, first, end], 1))
        first, end = start, stop
    return torch.stack(windows[::-1], 1)


def _nonzero_ranges(flags: UInt8[Tensor, "n cells"]) -> tuple[Int[Tensor, "n"], Int[Tensor, "n"]]:
    """Return the first cell of each row that is 1 and the end of the last one, 0 and 0 where there is none; on the CPU."""
    flags = flags.cpu()
    first, after_last = flags.argmax(1), flags.flip(1).argmax(1)
    return first, (flags.shape[1] - after_last) * flags.amax(1)
