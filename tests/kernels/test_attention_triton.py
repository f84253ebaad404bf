"""Logic in Triton's interpreter; machine code from Triton's compiler, which needs no GPU; numbers on a GPU if there is one."""

import itertools
import multiprocessing
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from maskset.kernels.attention_plain import by_embedding_bag, by_grid_sample
from maskset.kernels.self_check import triton_failure

triton = pytest.importorskip("triton", reason="no Triton for this platform", exc_type=ImportError)

from maskset.kernels.attention_triton import TILES, UNTUNED, _backward, _fixed_point_scale, _forward, backward, forward  # noqa: E402

LEVELS = [(5, 7), (3, 2)]

slow = pytest.mark.slow  # the interpreter needs about a second for each
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def case(dtype, width, shapes=LEVELS, batch=2, queries=9, heads=2, points=2, device="cpu"):
    """Return grad, value, shapes, locations and weights. No place is near a cell's center, where the gradient jumps."""
    generator = torch.Generator(device).manual_seed(0)
    exact = dtype if dtype == torch.float64 else torch.float32
    samples = (batch, queries, heads, len(shapes), points)
    sizes = torch.tensor([(w, h) for h, w in shapes], device=device)[:, None]
    cells = torch.rand(*samples, 2, generator=generator, device=device, dtype=torch.float64) * (sizes + 3) - 2
    past = torch.rand(*samples, 2, generator=generator, device=device, dtype=torch.float64) * 0.8 + 0.1
    locations = ((cells.floor() + 0.5 + past) / sizes).to(exact)
    weights = torch.rand(*samples, generator=generator, device=device, dtype=exact)
    total = sum(h * w for h, w in shapes)
    value = torch.randn(batch, total, heads, width, generator=generator, device=device, dtype=exact).to(dtype)
    grad = torch.randn(batch, queries, heads * width, generator=generator, device=device, dtype=exact).to(dtype)
    return grad, value, shapes, locations, weights


def expected(function, grad, value, shapes, locations, weights):
    """Return output and gradients in float64."""
    value, locations, weights = (t.double().requires_grad_() for t in (value, locations, weights))
    out = function(value, shapes, locations, weights)
    return out.detach(), *torch.autograd.grad(out, (value, locations, weights), grad.double())


def assert_close(found, wanted, dtype):
    for name, one, other in zip(("out", "grad_value", "grad_locations", "grad_weights"), found, wanted, strict=True):
        rounded = name in ("out", "grad_value")
        assert one.dtype == (dtype if rounded else torch.promote_types(dtype, torch.float32))
        near = 1e-12 if dtype == torch.float64 else 2e-5  # float32 has the place of a sample to so many cells
        rtol = torch.finfo(dtype).eps if rounded and dtype.itemsize == 2 else near
        atol = near * other.abs().max().item()
        torch.testing.assert_close(one.double(), other, atol=atol, rtol=rtol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(scope="module")
def interpreted():
    """A function that runs another in a process in which Triton interprets: it asks once, when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            yield lambda function, *arguments: process.submit(function, *arguments).result()


@pytest.fixture(params=[False, True], ids=["float", "fixed"])
def fixed(request, interpreted):
    """Whether torch asks for deterministic algorithms."""
    interpreted(torch.use_deterministic_algorithms, request.param)
    yield request.param
    interpreted(torch.use_deterministic_algorithms, False)


@pytest.mark.parametrize(
    ("dtype", "width", "shapes"),
    [
        pytest.param(torch.float64, 3, [(1, 1)], marks=slow),
        (torch.float64, 48, LEVELS),
        pytest.param(torch.float32, 32, LEVELS, marks=slow),
        pytest.param(torch.float16, 1, [(1, 5), (4, 1), (2, 2)], marks=slow),
        (torch.bfloat16, 36, [(4, 3)]),
    ],
)
def test_output_and_gradients_are_the_references(interpreted, fixed, dtype, width, shapes):
    grad, *inputs = case(dtype, width, shapes)
    found = interpreted(forward, *inputs), *interpreted(backward, grad, *inputs)
    assert_close(found, expected(by_grid_sample, grad, *inputs), dtype)


def test_a_level_without_cells_adds_nothing(interpreted):
    grad, value, shapes, locations, weights = case(torch.float64, 3, [(4, 3), (0, 2)])
    locations[:, :, :, 1] = 0.4
    found = interpreted(forward, value, shapes, locations, weights)
    assert torch.equal(found, interpreted(forward, value, shapes[:1], locations[:, :, :, :1], weights[:, :, :, :1]))
    gradients = interpreted(backward, grad, value, shapes, locations, weights)
    assert gradients[1][:, :, :, 1].abs().sum() == gradients[2][:, :, :, 1].abs().sum() == 0


def test_in_fixed_point_the_order_of_queries_does_not_matter(interpreted):
    grad, value, shapes, locations, weights = case(torch.float32, 4, queries=40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    interpreted(torch.use_deterministic_algorithms, True)
    one = interpreted(backward, grad, value, shapes, locations, weights)[0]
    other = interpreted(backward, grad[:, order], value, shapes, locations[:, order], weights[:, order])[0]
    interpreted(torch.use_deterministic_algorithms, False)
    third = interpreted(backward, grad[:, order], value, shapes, locations[:, order], weights[:, order])[0]
    assert torch.equal(one, other)
    assert not torch.equal(one, third)


@pytest.mark.parametrize("size", [pytest.param(1e-30, marks=slow), 1e30])
def test_fixed_point_holds_numbers_of_any_size(interpreted, size):
    grad, *inputs = case(torch.float32, 4)
    wanted = expected(by_grid_sample, grad, *inputs)[1]
    interpreted(torch.use_deterministic_algorithms, True)
    found = interpreted(backward, grad * size, *inputs)[0]
    interpreted(torch.use_deterministic_algorithms, False)
    torch.testing.assert_close(found.double() / size, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("place", "number"),
    [
        (0, torch.nan),
        *(pytest.param(*one, marks=slow) for one in [(0, torch.inf), (3, torch.nan), (4, torch.nan)]),
        (4, -torch.inf),
    ],
)
def test_in_fixed_point_what_is_not_finite_becomes_nan(interpreted, place, number):
    arguments = case(torch.float32, 4)
    arguments[place].flatten()[3] = number
    interpreted(torch.use_deterministic_algorithms, True)
    grad_value = interpreted(backward, *arguments)[0]
    interpreted(torch.use_deterministic_algorithms, False)
    assert grad_value.isnan().all()


def test_fixed_point_has_room_for_all_that_float16_holds():
    grad, _, _, locations, weights = case(torch.float16, 4)
    units = _fixed_point_scale(grad * 100, locations, weights.half() * 60000)
    assert 0 < units * (grad * 100).abs().amax() * 60000 * locations[0, :, 0, 0].numel() // 2 <= 2.0**62


@pytest.mark.parametrize(
    ("far", "axis"),
    [
        pytest.param(*one, marks=[] if one in [(torch.nan, 0), (1e30, 1)] else slow)
        for one in itertools.product([torch.nan, torch.inf, -torch.inf, 1e30, -1e9, 3.4e38], [0, 1])
    ],
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_locations_far_outside_or_nan_do_what_they_do_in_pytorch(interpreted, far, axis, device):
    run = interpreted if device == "cpu" else lambda function, *arguments: function(*arguments)
    grad, value, shapes, locations, weights = case(torch.float32, 4, queries=2, device=device)
    locations[0, 0, 0, 0, 0] = 0.45
    locations[0, 0, 0, 0, 0, axis] = far
    inputs = (value, shapes, locations, weights)
    out, grad_value, grad_locations, grad_weights = expected(by_embedding_bag, grad, *inputs)
    found = run(forward, *inputs), *run(backward, grad, *inputs)
    grad_locations[0, 0, 0, 0, 0] = found[2][0, 0, 0, 0, 0]  # of NaN there is no gradient
    wanted = (out, grad_value, grad_locations, grad_weights)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, atol=1e-4, rtol=1e-4, equal_nan=True)
    assert found[0][0, 0, :4].isnan().all() == (far != far)
    assert not found[0][1:].isnan().any()


def printed(program):
    """Return what a program prints in a process of its own in which Triton interprets."""
    environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path)}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_tuning_adds_nothing_to_the_gradients():
    program = """
import torch
from maskset.kernels import attention_triton as triton

value, weights, grad = torch.ones(1, 6, 1, 4), torch.ones(1, 5, 1, 1, 2), torch.ones(1, 5, 4)
arguments = (grad, value, [(2, 3)], torch.full((1, 5, 1, 1, 2, 2), 0.5), weights)
wanted = triton.backward(*arguments)
runs = []
for tuned in (triton._tuned_forward, triton._tuned_backward):  # there is no clock to ask: the third tile is the fastest
    tuned._do_bench = lambda call, quantiles: (call(), call(), runs.append(call), [abs(2 - (len(runs) - 1) % 4)] * 3)[-1]
triton.MIN_TUNED_SIZE = 0
assert torch.equal(triton.forward(*arguments[1:]), torch.full((1, 5, 4), 2.0))
for _ in range(2):
    assert all(torch.equal(one, other) for one, other in zip(triton.backward(*arguments), wanted, strict=True))
print(len(runs), triton._tuned_backward.best_config.kwargs["TILE"], wanted[0].sum().item())
"""
    assert printed(program) == "8 512 40.0"


def test_cells_behind_two_to_the_31_are_found():
    """Most of the memory is never touched, and thus never there; a process of its own gives it back."""
    program = """
import torch
from maskset.kernels.attention_triton import forward
wide, cells = 2**13, 2**27
value = torch.empty(2, cells, 1, 16, dtype=torch.bfloat16)  # 2**31 in each image
value[0, 0], value[0, -1], value[1, 0], value[1, -1] = 1.0, 2.0, 3.0, 4.0
center = torch.tensor([0.5 / wide, 0.5 * wide / cells])
locations = torch.stack([center, 1 - center.double()]).float().view(1, 2, 1, 1, 1, 2).expand(2, -1, -1, -1, -1, -1)
seen = forward(value, [(cells // wide, wide)], locations, torch.ones(2, 2, 1, 1, 1))
print(seen.amin(-1).flatten().tolist(), seen.amax(-1).flatten().tolist())
"""
    assert printed(program) == "[1.0, 2.0, 3.0, 4.0] [1.0, 2.0, 3.0, 4.0]"


@pytest.mark.parametrize("missing", ["batch", "queries", "heads", "points", "cells", "width"])
def test_without_queries_or_cells_or_points_all_is_zero(missing):
    shapes, width = ([(0, 3), (2, 0)] if missing == "cells" else LEVELS), (0 if missing == "width" else 4)
    none = {missing: 0} if missing not in ("cells", "width") else {}
    grad, *inputs = case(torch.float32, width, shapes, **none)
    assert torch.equal(forward(*inputs), torch.zeros_like(grad))
    for gradient, tensor in zip(backward(grad, *inputs), (inputs[0], *inputs[2:]), strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


def compiled(kernel, width, dtype, tile, target, path, **others):
    """Return the PTX of a kernel and what its machine code needs: registers, stack, shared and local memory."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    numbers = {"HEADS": 8, "WIDTH": width, "LEVELS": 4, "POINTS": 4, "PADDED": triton.next_power_of_2(width)}
    constants = numbers | {"DTYPE": triton.language.float32, "INDEX": triton.language.int32, "TILE": tile["TILE"], "scale": None}
    kinds = dict.fromkeys(kernel.arg_names, "*fp32")
    kinds |= {"value": dtype, "out": dtype, "grad": dtype, "levels": "*i32", "cells": "i32", "queries": "i32"}
    kinds |= dict.fromkeys(constants, "constexpr") | others
    signature = {name: kinds[name] for name in kernel.arg_names}
    constants = {name: number for name, number in constants.items() if signature.get(name) == "constexpr"}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    options = {"num_warps": tile["num_warps"], "num_stages": 1, "enable_fp_fusion": True}
    source = ASTSource(kernel, signature, constants, aligned)
    code = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options).asm
    (path / "kernel.cubin").write_bytes(code["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    report = subprocess.run([tool, "-res-usage", path / "kernel.cubin"], capture_output=True, text=True, check=True).stdout
    return code["ptx"], {name: int(size) for name, size in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", report)}


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return lambda *arguments, **others: compiled(*arguments, tmp_path, **others)


SETTINGS = [config.all_kwargs() for config in TILES]
EVERY = list(itertools.product([_forward, _backward], [32, 48], ["*fp32", "*bf16"], SETTINGS, [80, 90]))
FIRST = [(_forward, 48, "*fp32", UNTUNED, 80), (_backward, 32, "*fp32", UNTUNED, 90)]


def name(setting):
    return f"{setting['TILE']}x{setting['num_warps']}" if isinstance(setting, dict) else getattr(setting, "__name__", None)


@pytest.mark.parametrize(
    ("kernel", "width", "dtype", "tile", "target"),
    [pytest.param(*one, marks=[] if one in FIRST else slow) for one in EVERY],
    ids=name,
)
def test_machine_code_keeps_all_in_registers_and_reads_16_bytes_at_a_time(compiler, kernel, width, dtype, tile, target):
    ptx, needs = compiler(kernel, width, dtype, tile, target)
    assert needs["REG"] <= 255
    assert needs["LOCAL"] == 0
    # For lack of wide atomic additions, an A100 needs so many registers that 8 bytes do not fit with the largest tile.
    assert needs["STACK"] <= (8 if kernel is _backward and target == 80 else 0)
    assert f"ld.global.v{2 if kernel is _backward and dtype == '*bf16' else 4}" in ptx
    assert ptx.count(".wide.s32") > 4 * 4  # for each corner of each sample: 32 bits, made an address by one instruction
    if kernel is _backward:
        assert ("red.global.gpu.relaxed.add.v4.f32" if target >= 90 else "red.global.gpu.relaxed.add.f32") in ptx


def test_machine_code_adds_integers_in_fixed_point(compiler):
    ptx, needs = compiler(_backward, 32, "*fp32", UNTUNED, 90, grad_value="*i64", scale="*fp32")
    assert "red.global.gpu.relaxed.add.u64" in ptx
    assert needs["STACK"] == needs["LOCAL"] == 0


ENCODER = [(50, 67), (25, 34), (13, 17), (7, 9)]


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("width", [32, 48, 36, 1])
def test_output_and_gradients_are_the_references_on_a_gpu(dtype, width):
    grad, *inputs = case(dtype, width, ENCODER, queries=301, heads=8, points=4, device="cuda")
    found = forward(*inputs), *backward(grad, *inputs)
    assert_close(found, expected(by_grid_sample, grad, *inputs), dtype)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tuning_leaves_output_and_gradients_as_they_are(dtype):
    grad, *inputs = case(dtype, 32, ENCODER, queries=4_500, heads=8, points=4, device="cuda")
    wanted = expected(by_grid_sample, grad, *inputs)
    for _ in range(2):  # the first call tunes
        assert_close((forward(*inputs), *backward(grad, *inputs)), wanted, dtype)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_are_equal_bit_for_bit_where_torch_asks_for_it(deterministic, dtype):
    grad, *inputs = case(dtype, 32, ENCODER, queries=4_500, heads=8, points=4, device="cuda")
    one, other = ((forward(*inputs), *backward(grad, *inputs)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert_close(one, expected(by_grid_sample, grad, *inputs), dtype)


@gpu
def test_an_image_behind_two_to_the_31_is_found_on_a_gpu():
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of free GPU memory")
    grad, value, shapes, locations, weights = case(torch.bfloat16, 32, ENCODER, 1, 300, 8, 4, "cuda")
    many = 2**31 // value[0].numel() + 2
    inputs = (value.expand(many, -1, -1, -1).contiguous(), shapes)
    per_query = [t.expand(many, *(-1,) * (t.dim() - 1)).contiguous() for t in (locations, weights)]
    last = forward(*inputs, *per_query)[-1:]
    grads = [gradient[-1:] for gradient in backward(grad.expand(many, -1, -1).contiguous(), *inputs, *per_query)]
    wanted = expected(by_grid_sample, grad, value, shapes, locations, weights)
    assert_close((last, *grads), wanted, torch.bfloat16)


def test_the_kernels_pass_their_check_at_first_use(interpreted, fixed):
    assert interpreted(triton_failure, torch.device("cpu")) is None
