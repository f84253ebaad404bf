"""A program that calls every Python function in front of the C library with random, mostly wrong arguments.

Each call must return or raise a MasksetError. test_sanitizers.py runs it with a library that detects wrong reads and writes of
memory. It is not imported by pytest, whose checks of shapes would refuse most arguments before they arrive.
"""

import ctypes
import sys
from collections.abc import Callable

import hypothesis.strategies as st
import torch
from hypothesis import HealthCheck, given, settings

from maskset.errors import MasksetError
from maskset.kernels import attention, fields, library, runs
from maskset.kernels.instance_transformer import fused, fused_backward

DTYPES = [torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool]
WEIRD = [0, 1, -1, 2, 3, 7, 100, -100, 10**6, -(10**6), 2**31, -(2**31), 2**40, -(2**62)]


class Arguments:
    """Arguments of one call. They are drawn so that roughly half of all calls are valid."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.random = torch.Generator().manual_seed(self.int(0, 2**20))
        self.faults = self.int(0, 1) * self.int(1, 3)

    def int(self, low: int, high: int) -> int:
        return self.data.draw(st.integers(low, high))

    def faulty(self) -> bool:
        """Return whether to make the next argument wrong."""
        wrong = self.faults > 0 and self.int(0, 3) == 0
        self.faults -= wrong
        return wrong

    def number(self, right: int) -> int:
        return self.data.draw(st.sampled_from(WEIRD)) if self.faulty() else right

    def size(self, height: int, width: int) -> tuple[int, int]:
        size = self.number(height), self.number(width)
        return (
            size if max(size) <= 1000 or min(size) < 0 or size[0] * size[1] >= 2**31 else (height, width)
        )  # not too much memory

    def shape(self, *right: int) -> tuple[int, ...]:
        shape = list(right)
        if self.faulty():
            axis = self.int(0, len(shape) - 1)
            shape[axis] = max(0, self.data.draw(st.sampled_from([0, 1, shape[axis] - 1, shape[axis] + 1, 2 * shape[axis], 1000])))
        if self.faulty():
            shape = shape[1:] if self.int(0, 1) else [1, *shape]
        return tuple(shape) if torch.Size(shape).numel() < 2**20 else right

    def tensor(self, right: tuple[int, ...], dtype: torch.dtype, low: float = 0, high: float = 1) -> torch.Tensor:
        shape = self.shape(*right)
        values = torch.rand(shape, generator=self.random, dtype=torch.float64) * (high - low) + low
        if values.numel() and self.faulty():
            values.view(-1)[self.int(0, values.numel() - 1)] = self.data.draw(
                st.sampled_from([*map(float, WEIRD), float("nan"), float("inf")])
            )
        values = values.round() if not dtype.is_floating_point else values
        values = values.nan_to_num(0).clamp(-(2.0**62), 2.0**62) if not dtype.is_floating_point else values
        values = values.to(self.data.draw(st.sampled_from(DTYPES)) if self.faulty() else dtype)
        return values.transpose(0, -1).contiguous().transpose(0, -1) if values.ndim and self.int(0, 3) == 0 else values

    def counts(self, number: int, pixels: int) -> list[torch.Tensor]:
        return [self.tensor((self.int(0, 6),), torch.int32, 0, pixels / 2) for _ in range(number)]

    def view(self, number: int) -> runs.View:
        height, width = self.int(0, 9), self.int(0, 9)
        counts = runs.concatenate(self.counts(number, height * width))
        rows = torch.randint(0, height + 1, (self.int(0, 9),), generator=self.random).sort().values
        columns = torch.randint(-1, max(1, width), (self.int(0, 9),), generator=self.random)
        if self.faulty():
            counts = counts[0], self.tensor((number + 1,), torch.int64, -9, 99)
        if self.faulty():
            rows = self.tensor((len(rows),), torch.int64, -5, 20)
        if self.faulty():
            columns = self.tensor((len(columns),), torch.int64, -5, 20)
        height = self.number(height)
        return runs.View(*counts, height if height < 2**20 else 9, rows, columns)

    def taps(self, cells: int, number: int) -> runs.Taps:
        low = torch.randint(0, max(1, cells), (number,), generator=self.random).sort().values
        high = (low + 1).clamp(max=max(0, cells - 1))
        if self.faulty():
            low = self.tensor((number,), torch.int64, -3, 20)
        if self.faulty():
            high = self.tensor((number,), torch.int64, -3, 20)
        return low, high, self.tensor((number,), torch.float32), self.tensor((number,), torch.float32)


def runs_encode(draw: Arguments) -> None:
    runs.encode(draw.tensor((draw.int(0, 3), draw.int(0, 99), draw.int(0, 99)), torch.bool))


def runs_view(draw: Arguments) -> None:
    runs.encode_view(draw.view(draw.int(0, 3)))


def runs_draw(draw: Arguments) -> None:
    runs.dense(draw.view(draw.int(0, 3)))


def runs_measure(draw: Arguments) -> None:
    height = draw.int(1, 9)
    runs.boxes_and_areas(draw.counts(draw.int(0, 3), 99), draw.number(height))


def runs_to_text(draw: Arguments) -> None:
    runs.to_strings(draw.counts(draw.int(0, 3), 99))


def runs_from_text(draw: Arguments) -> None:
    runs.from_string(draw.data.draw(st.binary(max_size=20) | st.text("0123PQo", max_size=20).map(str.encode)))


def polygons_draw(draw: Arguments) -> None:
    corners = [draw.number(draw.int(0, 5)) for _ in range(draw.int(0, 4))]
    parts = [draw.number(1) for _ in corners]
    points = draw.tensor((sum(corners) if 0 <= sum(corners) < 100 else 9, 2), torch.float64, -20, 60)
    runs.rasterize(points, corners, parts, draw.size(draw.int(0, 50), draw.int(0, 50)))


def fields_paste(draw: Arguments) -> None:
    number, side = draw.int(0, 3), draw.int(1, 9)
    boxes = draw.tensor((number, 4), torch.float32, -10, 60)
    fields.paste(draw.tensor((number, side, side), torch.float32), boxes, draw.size(draw.int(0, 50), draw.int(0, 50)), 0.5)


def _parts(draw: Arguments) -> tuple:
    number, height, width, out_height, out_width = (draw.int(0 if i == 0 else 1, 9) for i in range(5))
    rows, columns = draw.taps(height, out_height), draw.taps(width, out_width)
    begins, apart = torch.arange(number) * height * width, torch.full((number,), width)
    ends = [
        torch.tensor([[0, cells, 0, pixels]]).expand(number, 4) for cells, pixels in ((height, out_height), (width, out_width))
    ]
    parts = fields.parts(begins, apart, *ends)
    if number and draw.faulty():
        parts[draw.int(0, number - 1), draw.int(0, 7)] = draw.data.draw(st.sampled_from(WEIRD))
    if draw.faulty():
        parts = draw.tensor((number, 8), torch.int64, -2, 9)
    return draw.tensor((number * height * width,), torch.float32), parts, rows, columns


def fields_resize(draw: Arguments) -> None:
    fields.resize(*_parts(draw))


def fields_cut(draw: Arguments) -> None:
    fields.cut(*_parts(draw), 0.5)


def targets_crop(draw: Arguments) -> None:
    view = draw.view(draw.int(0, 3))
    size = draw.number(draw.int(1, 9))
    runs.crop(view, draw.tensor((max(0, len(view)), 4), torch.float32, -5, 15), size if size < 2**10 else 9)


def targets_resize(draw: Arguments) -> None:
    runs.resize(draw.view(draw.int(0, 3)), draw.taps(9, draw.int(0, 9)), draw.taps(9, draw.int(0, 9)))


def targets_resize_opencv(draw: Arguments) -> None:
    runs.resize_as_opencv(draw.view(draw.int(0, 3)), draw.taps(9, draw.int(0, 9)), draw.taps(9, draw.int(0, 9)))


def _attention(draw: Arguments) -> tuple:
    batch, queries, heads, width, points = draw.int(0, 2), draw.int(0, 5), draw.int(1, 3), draw.int(1, 70), draw.int(1, 3)
    shapes = [(draw.int(0, 5), draw.int(0, 5)) for _ in range(draw.int(1, 3))]
    cells = sum(h * w for h, w in shapes)
    shapes = [(draw.number(h), draw.number(w)) for h, w in shapes]
    if draw.faulty():  # the sum is right, but for the signs
        shapes, cells = [(1000, 1000), (-1000, 1000), (2, 3)], 6
    dtype = draw.data.draw(st.sampled_from([torch.float32, torch.float64]))
    samples = batch, queries, heads, len(shapes), points
    grad, value = draw.tensor((batch, queries, heads * width), dtype), draw.tensor((batch, cells, heads, width), dtype)
    return grad, value, shapes, draw.tensor((*samples, 2), dtype, -1, 2), draw.tensor(samples, dtype)


def deformable_attention(draw: Arguments) -> None:
    attention.forward(*_attention(draw)[1:])


def deformable_attention_backward(draw: Arguments) -> None:
    attention.backward(*_attention(draw))


def _instances(draw: Arguments) -> tuple:
    count, heads, points, height, width = draw.int(0, 3), draw.int(1, 2), draw.int(1, 3), draw.int(0, 5), draw.int(0, 5)
    channels = 2 * heads * draw.int(1, 2)
    dtype = draw.data.draw(st.sampled_from([torch.float32, torch.float64]))
    cells = draw.tensor((height, width, channels), dtype), draw.tensor((height, width, channels), dtype)
    rows, columns = (draw.tensor((count, 2, side, channels // 2), dtype) for side in (height, width))
    inside = draw.tensor((height,), torch.uint8, 0, 2), draw.tensor((width,), torch.uint8)
    mixing = draw.tensor((count, channels + 1, 3, heads * points), dtype, -3, 3)
    inputs = (*cells, rows, columns, *inside, mixing, draw.tensor((count, channels + 1), dtype), draw.number(heads))
    return draw.tensor((count, height, width), dtype), inputs


def instance_transformer(draw: Arguments) -> None:
    fused(*_instances(draw)[1])


def instance_transformer_backward(draw: Arguments) -> None:
    grad, (*inputs, heads) = _instances(draw)
    fused_backward(grad, inputs, heads)


CALLS = {
    "runs_encode": runs_encode,
    "runs_view": runs_view,
    "runs_draw": runs_draw,
    "runs_measure": runs_measure,
    "runs_to_text": runs_to_text,
    "runs_from_text": runs_from_text,
    "polygons_crossings": polygons_draw,
    "polygons_draw": polygons_draw,
    "fields_resize": fields_resize,
    "fields_cut": fields_cut,
    "fields_paste": fields_paste,
    "targets_crop": targets_crop,
    "targets_resize": targets_resize,
    "targets_resize_opencv": targets_resize_opencv,
    "deformable_attention": deformable_attention,
    "deformable_attention_backward": deformable_attention_backward,
    "instance_transformer": instance_transformer,
    "instance_transformer_backward": instance_transformer_backward,
}


def main(path: str, examples: int) -> None:
    """Call every function with `examples` random arguments, using the library at a path, and print how many calls it refused."""
    library._loaded = ctypes.CDLL(path)
    for name, call in CALLS.items():
        print(name, end=" ", flush=True)
        print(*(f"{count} {answer}" for answer, count in answers_of(call, examples).items()), flush=True)


def answers_of(call: Callable[[Arguments], None], examples: int) -> dict[str, int]:
    answers = {"returned": 0, "refused": 0}

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run(data: st.DataObject) -> None:
        try:
            call(Arguments(data))
            answers["returned"] += 1
        except MasksetError:
            answers["refused"] += 1

    run()
    return answers


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
