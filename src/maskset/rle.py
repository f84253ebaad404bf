"""Run-length encoding of masks, in COCO's convention.

A mask of height h and width w is a list of counts that sum to h * w. They count equal pixels column by column (down, then
right), alternately of the background and of the mask; the first count is 0 if the first pixel is set. Counts are one-dimensional
int32 tensors on any device. On a CPU the C library processes them (kernels/runs.py, kernels/csrc/runs.c and polygons.c);
the Python code here is its reference, and runs on other devices.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int32, Int64
from torch import Tensor

from maskset.errors import MaskError
from maskset.kernels import library, runs

Counts = Int32[Tensor, "_"]
Indices = Int64[Tensor, "_"]  # rows or columns
Polygons = tuple[np.ndarray, ...]  # the parts of one object, each float64 [n, 2], x and y in pixels
LONGEST_OUTLINE = 2**22  # pixels; pycocotools takes about 60 bytes for each
_MAX_PIXELS = 2**26  # decoded at a time


def encode(masks: Bool[Tensor, "T h w"]) -> list[Counts]:
    """Return the run lengths of each mask, on the device of the masks.

    Raises:
        MaskError: the masks are not [T h w], boolean or integers (0 is background), or too large, see `check_pixel_count`.
    """
    if masks.ndim != 3 or masks.is_floating_point():
        raise MaskError(f"masks must be boolean [T h w], got {masks.dtype} of shape {list(masks.shape)}: use `masks > 0.5`.")
    masks = masks.bool()
    count, height, width = masks.shape
    check_pixel_count((height, width))
    if library.supports(masks.device):
        return runs.encode(masks)  # Fast path: kernels/csrc/runs.c, runs_encode
    flat = masks.transpose(1, 2).reshape(count, height * width)
    if flat.shape[1] == 0:
        return [torch.zeros(0, dtype=torch.int32, device=masks.device) for _ in range(count)]
    border = torch.zeros(count, 1, dtype=torch.bool, device=masks.device)
    changes = torch.cat([border, flat], 1) != torch.cat(
        [flat, ~flat[:, -1:]], 1
    )  # a change after the last pixel ends the last run
    changed = changes.nonzero()
    ends = changed[:, 1].to(torch.int32).split(changes.sum(1).tolist())
    return [torch.diff(end, prepend=end.new_zeros(1)) for end in ends]


def decode(
    counts: Sequence[Counts], size: tuple[int, int], rows: Indices | None = None, columns: Indices | None = None
) -> Bool[Tensor, "T h w"]:
    """Return dense masks, on the device of the counts.

    Args:
        counts: run lengths; each must sum to height * width.
        size: height and width of the masks.
        rows: indices of the rows to return, ascending, possibly repeated; None: all.
        columns: indices of the columns to return, in any order; None: all.
    """
    device = counts[0].device if len(counts) else torch.device("cpu")
    if library.supports(device):
        return runs.dense(runs.view(counts, size, rows, columns))  # Fast path: kernels/csrc/runs.c, runs_draw
    height, width = size
    if columns is not None and len(columns):  # decode only the columns between the first and the last index
        first, end = int(columns.min()), int(columns.max()) + 1
        counts, width, columns = [_columns(run, height, first, end) for run in counts], end - first, columns - first
    masks = _decode(counts, height, width, device)
    if rows is not None:
        masks = masks[:, rows.to(device)]
    return masks if columns is None else masks[:, :, columns.to(device)]


def _decode(counts: Sequence[Counts], height: int, width: int, device: torch.device) -> Bool[Tensor, "T h w"]:
    if not len(counts):
        return torch.zeros(0, height, width, dtype=torch.bool, device=device)
    lengths = torch.tensor([len(c) for c in counts], device=device)
    starts = lengths.cumsum(0) - lengths
    flat = torch.cat(list(counts))
    position = torch.arange(len(flat), device=device) - starts.repeat_interleave(lengths)
    pixels = (position % 2 == 1).repeat_interleave(flat, output_size=len(counts) * height * width)
    return pixels.view(len(counts), width, height).transpose(1, 2)


def _columns(counts: Counts, height: int, first: int, end: int) -> Counts:
    """Return the run lengths of the columns from `first` up to `end` (exclusive), without decoding."""
    ends = counts.cumsum(0).clamp(first * height, end * height).to(torch.int32)
    return torch.diff(ends, prepend=ends.new_tensor([first * height]))


def select(counts: Sequence[Counts], size: tuple[int, int], rows: Indices | None, columns: Indices | None) -> list[Counts]:
    """Return the run lengths of the selected rows and columns of masks, see `decode`.

    Raises:
        MaskError: a mask would have too many pixels, see `check_pixel_count`.
    """
    check_pixel_count((size[0] if rows is None else len(rows), size[1] if columns is None else len(columns)))
    if library.supports(counts[0].device if len(counts) else torch.device("cpu")):
        return runs.encode_view(runs.view(counts, size, rows, columns))  # Fast path: kernels/csrc/runs.c, runs_view
    chunk = max(1, _MAX_PIXELS // max(1, size[0] * size[1]))
    parts = (decode(counts[i : i + chunk], size, rows, columns) for i in range(0, len(counts), chunk))
    return [run for part in parts for run in encode(part)]


def encode_window(window: Bool[Tensor, "h w"], left: int, top: int, size: tuple[int, int]) -> Counts:
    """Return the run lengths of a mask of `size` that is empty except for a window at (left, top)."""
    height, width = size
    columns = torch.zeros(window.shape[1], height, dtype=torch.bool, device=window.device)
    columns[:, top : top + window.shape[0]] = window.T
    strip = encode(columns.T[None])[0]
    before, after = left * height, (width - left - window.shape[1]) * height
    strip = torch.cat([strip[:1] + before, strip[1:]])
    if len(strip) % 2:  # ends with background
        return torch.cat([strip[:-1], strip[-1:] + after])
    return torch.cat([strip, strip.new_tensor([after])]) if after else strip


def area(counts: Counts) -> int:
    """Return the number of pixels set."""
    return int(counts[1::2].sum())


def areas(counts: Sequence[Counts]) -> Int64[Tensor, "T"]:
    """Return the number of pixels set in each mask, on the device of the masks."""
    if not len(counts):
        return torch.zeros(0, dtype=torch.int64)
    if library.supports(counts[0].device):
        return runs.boxes_and_areas(counts, height=1)[:, 4]  # Fast path: kernels/csrc/runs.c, runs_measure
    return torch.stack([run[1::2].sum() for run in counts])


def box(counts: Counts, height: int) -> tuple[float, float, float, float]:
    """Return the tight box x0 y0 x1 y1 of a mask in pixels, x1 and y1 exclusive; all zero if no pixel is set."""
    ends = counts.cpu().numpy().astype(np.int64).cumsum()
    first, last = ends[0:-1:2], ends[1::2] - 1  # of every run of set pixels, both inclusive
    first, last = first[last >= first], last[last >= first]
    if not len(first):
        return 0.0, 0.0, 0.0, 0.0
    left, right = first[0] // height, last[-1] // height
    wraps = first // height != last // height  # a run that continues in the next column touches bottom and top
    top = 0 if wraps.any() else (first % height).min()
    bottom = height - 1 if wraps.any() else (last % height).max()
    return float(left), float(top), float(right + 1), float(bottom + 1)


def boxes(counts: Sequence[Counts], height: int) -> Float[Tensor, "T 4"]:
    """Return the box of each mask, as `box` does, on the CPU."""
    on_cpu = [run.cpu() for run in counts]
    if library.supports(torch.device("cpu")):
        return runs.boxes_and_areas(on_cpu, height)[:, :4].float()  # Fast path: kernels/csrc/runs.c, runs_measure
    return torch.tensor([box(run, height) for run in on_cpu], dtype=torch.float32).view(-1, 4)


def to_strings(counts: Sequence[Counts], size: tuple[int, int]) -> list[str]:
    """Return each mask in COCO's compressed text; all masks have the same `size` (height, width)."""
    if library.supports(torch.device("cpu")):
        return runs.to_strings([run.cpu() for run in counts])  # Fast path: kernels/csrc/runs.c, runs_to_text
    from pycocotools import mask as coco_mask

    uncompressed: Any = [{"counts": run.tolist(), "size": list(size)} for run in counts]
    return [run["counts"].decode() for run in coco_mask.frPyObjects(uncompressed, *size)] if len(counts) else []


def from_string(text: str | bytes) -> Counts:
    """Return the run lengths of a mask in COCO's compressed text.

    Each number is written in groups of 5 bits, low group first, as characters from '0' on. Bit 5 is set if more groups follow;
    bit 4 of the last group is the sign. From the fourth number on, each is the difference to the number two before.

    Raises:
        MaskError: a character is outside of '0' to 'o', or the text ends inside a number.
    """
    data = text.encode("ascii", "replace") if isinstance(text, str) else text
    if library.supports(torch.device("cpu")):
        counts = runs.from_string(data)  # Fast path: kernels/csrc/runs.c, runs_from_text
        if isinstance(counts, int):
            raise MaskError(f"the run-length text {_TEXT_ERRORS[counts]}.")
        return counts
    return _from_string(data)


_TEXT_ERRORS = {
    -1: "holds characters outside of '0' to 'o'",
    -2: "ends inside a number",
    -3: "holds a number of more than 32 bits",
    -4: "holds a run length of more than 32 bits",
}


def _from_string(text: bytes) -> Counts:
    data = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - 48
    if not len(data):
        return torch.zeros(0, dtype=torch.int32)
    if data.min() < 0 or data.max() > 63:
        raise MaskError(f"the run-length text {_TEXT_ERRORS[-1]}.")
    last = (data & 32) == 0
    if not last[-1]:
        raise MaskError(f"the run-length text {_TEXT_ERRORS[-2]}.")
    stops = np.flatnonzero(last) + 1
    starts = np.concatenate([[0], stops[:-1]])
    place = np.arange(len(data)) - np.repeat(starts, stops - starts)
    if place.max() > 6:
        raise MaskError(f"the run-length text {_TEXT_ERRORS[-3]}.")
    numbers = np.add.reduceat((data & 31) << (5 * place), starts)
    negative = (data[stops - 1] & 16) != 0
    numbers -= np.where(negative, np.int64(1) << (5 * (stops - starts)), 0)
    numbers[1::2] = numbers[1::2].cumsum()
    numbers[2::2] = numbers[2::2].cumsum()
    return _as_counts(numbers)


def check_pixel_count(size: tuple[int, int]) -> tuple[int, int]:
    """Return `size` (height, width) if the masks of such an image can be encoded as run lengths.

    Raises:
        MaskError: it has more pixels than a run length can count.
    """
    if size[0] * size[1] > 2**31 - 1:
        raise MaskError(
            f"an image of {size[0]} x {size[1]} (height x width) pixels is too large for run lengths: at most 2^31 - 1 pixels."
        )
    return size


def check(counts: Counts, size: tuple[int, int]) -> Counts:
    """Return `counts` if they are run lengths of a mask of `size` (height, width).

    Raises:
        MaskError: a count is negative or the sum is not height * width.
    """
    total, expected = int(counts.sum(dtype=torch.int64)), size[0] * size[1]
    if len(counts) and int(counts.min()) < 0:
        raise MaskError(f"a run length is negative ({int(counts.min())}).")
    if total != expected:
        raise MaskError(f"the run lengths sum to {total}, but {size[0]} x {size[1]} (height x width) has {expected} pixels.")
    return counts


def from_list(counts: Sequence[Any]) -> Counts:
    """Return run lengths from the list of an uncompressed COCO mask.

    Raises:
        MaskError: an entry is not a whole number, or does not fit.
    """
    try:
        values = np.asarray(counts)
        with np.errstate(invalid="ignore"):  # the comparison below finds values that do not fit
            numbers = values.astype(np.int64)
        exact = values.ndim == 1 and values.dtype.kind in "iuf" and bool((numbers == values).all())
    except (TypeError, ValueError, OverflowError):
        exact = False
    if len(counts) and not exact:
        raise MaskError("a run length is not a whole number.")
    return _as_counts(numbers if len(counts) else np.zeros(0, np.int64))


def from_polygons(polygons: Polygons, size: tuple[int, int]) -> Counts:
    """Return the run lengths of the union of polygons, rasterized as COCO does, in an image of `size` (height, width).

    Raises:
        MaskError: a coordinate is not finite or far outside of the image, see `check_polygons`.
    """
    return rasterize([polygons], size)[0]


def rasterize(masks: Sequence[Polygons], size: tuple[int, int]) -> list[Counts]:
    """Return the run lengths of each mask, see `from_polygons`."""
    check_pixel_count(size)
    for polygons in masks:
        check_polygons(polygons, size)
    if library.supports(torch.device("cpu")):  # Fast path: kernels/csrc/polygons.c
        parts = [part for polygons in masks for part in polygons]
        points = torch.from_numpy(np.concatenate([np.zeros((0, 2)), *parts]))
        return runs.rasterize(points, [len(part) for part in parts], [len(polygons) for polygons in masks], size)
    from pycocotools import mask as coco_mask

    drawn = [coco_mask.frPyObjects([part.reshape(-1).tolist() for part in polygons], *size) for polygons in masks]
    return [from_string(coco_mask.merge(parts)["counts"]) for parts in drawn]


def check_polygons(polygons: Polygons, size: tuple[int, int]) -> Polygons:
    """Return `polygons` if pycocotools, which checks nothing, can rasterize them in an image of `size` (height, width).

    Raises:
        MaskError: there is no polygon, one has fewer than three points, or a coordinate is not finite or far outside.
    """
    if not polygons:
        raise MaskError("the list of polygons is empty.")
    reach = 2 * max(size) + 100  # real annotations overshoot by a few pixels; pycocotools' time and memory grow with this
    for part in polygons:
        if part.ndim != 2 or part.shape[1] != 2 or len(part) < 3:
            raise MaskError(f"a polygon needs three or more x y pairs, got {part.size} numbers.")
        if not np.abs(part).max() <= reach:
            if not np.isfinite(part).all():
                raise MaskError("a polygon's coordinate is not finite.")
            raise MaskError(
                f"a polygon's coordinate is {part.flat[np.abs(part).argmax()]:g}, far outside of {size[1]} x {size[0]} pixels."
            )
        # This bound of the outline's length is cheap; the length itself is computed only if the bound is too large.
        if 2 * reach * len(part) > LONGEST_OUTLINE and np.abs(np.diff(part, axis=0)).max(1).sum() > LONGEST_OUTLINE:
            raise MaskError(f"a polygon's outline is longer than {LONGEST_OUTLINE:,} pixels.")
    return polygons


def from_coco(segmentation: Any, size: tuple[int, int]) -> Counts | Polygons:
    """Return a COCO annotation's `segmentation` (polygons, or compressed or uncompressed run lengths), checked.

    Raises:
        MaskError: it is none of these or does not fit an image of `size` (height, width).
    """
    if isinstance(segmentation, dict):
        if not isinstance(segmentation.get("counts"), (str, bytes, list)) or "size" not in segmentation:
            raise MaskError("a run-length segmentation needs 'counts' (text or list) and 'size'.")
        if segmentation["size"] not in (list(size), tuple(size)):
            raise MaskError(
                f"the run lengths are for size {segmentation['size']!r:.50}, the image is {list(size)} (height, width)."
            )
        counts = segmentation["counts"]
        return check(from_list(counts) if isinstance(counts, list) else from_string(counts), size)
    if not isinstance(segmentation, list):
        raise MaskError(f"a segmentation is a list of polygons or a dict of run lengths, got {type(segmentation).__name__}.")
    parts = []
    for part in segmentation:
        try:
            flat = np.asarray(part, dtype=np.float64)
        except (TypeError, ValueError, OverflowError):
            raise MaskError("a polygon is not a list of numbers.") from None
        if flat.ndim != 1 or flat.size % 2:
            raise MaskError(f"a polygon is a flat list x0, y0, x1, y1, ..., got {flat.size} numbers of shape {flat.shape}.")
        parts.append(flat.reshape(-1, 2))
    return check_polygons(tuple(parts), size)


def _as_counts(numbers: np.ndarray) -> Counts:
    if len(numbers) and (numbers.max() > 2**31 - 1 or numbers.min() < -(2**31)):
        raise MaskError("a run length does not fit 32 bits.")
    return torch.from_numpy(numbers.astype(np.int32))


Index = Int[Tensor, "_"] | Bool[Tensor, "_"] | slice


def outlines(counts: Counts, size: tuple[int, int]) -> list[np.ndarray]:
    """Return the outer outline of each connected part (4-neighbors) of a mask, [n 2] of x and y along the pixels' edges.

    Every outline is clockwise on the screen, without points on straight lines. Holes are not outlined. If COCO rasterizes
    the outlines of a mask without holes, the result is the same mask, pixel for pixel.
    """
    padded = np.pad(decode([counts.cpu()], size)[0].numpy(), 1)
    # Unit steps along pixel edges with the mask on their right: edges[direction] at corner (y, x); right, down, left, up.
    inner, edges = padded[1:-1, 1:-1], np.zeros((4, size[0] + 1, size[1] + 1), dtype=bool)
    edges[0, :-1, :-1] = inner & ~padded[:-2, 1:-1]
    edges[1, :-1, 1:] = inner & ~padded[1:-1, 2:]
    edges[2, 1:, 1:] = inner & ~padded[2:, 1:-1]
    edges[3, 1:, :-1] = inner & ~padded[1:-1, :-2]
    steps = ((0, 1), (1, 0), (0, -1), (-1, 0))
    outer = []
    for y0, x0 in np.argwhere(edges[0]):
        if not edges[0, y0, x0]:
            continue
        points, y, x, direction = [], int(y0), int(x0), 0
        while edges[direction, y, x]:
            edges[direction, y, x] = False
            y, x = y + steps[direction][0], x + steps[direction][1]
            turns = [
                turn for turn in ((direction + 1) % 4, direction, (direction + 3) % 4) if edges[turn, y, x]
            ]  # right first, to stay on this part
            if not turns or turns[0] != direction:
                points.append((x, y))
            direction = turns[0] if turns else direction
        outline = np.array(points, dtype=np.float64)
        rolled = np.roll(outline, -1, 0)
        if (outline[:, 0] * rolled[:, 1] - rolled[:, 0] * outline[:, 1]).sum() > 0:  # holes run in the other direction
            outer.append(outline)
    return outer
