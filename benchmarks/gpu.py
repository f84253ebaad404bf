"""Checks of everything that runs differently on a GPU, in at most eight minutes: results, training, speed and memory.

Each attention implementation against its plain version in every precision, forward and backward; the official numbers of every
system, computed on the device; a training in bfloat16 that is killed and resumed; DistributedDataParallel in one process; peak
memory; and the benchmarks in short. A check that fails does not stop the others. `--device cpu` rehearses all of it without a
GPU: Triton's kernels run in its interpreter, and the benchmarks in their quick form.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from torch import Tensor, nn

from benchmarks import attention, measure
from benchmarks.report import Report, where
from benchmarks.training import example, total
from maskset import recipes
from maskset.data import shapes
from maskset.files import atomic_write
from maskset.kernels.attention import FUSED, PLAIN, implementations
from maskset.kernels.attention_plain import by_grid_sample
from maskset.systems import build

ROOT = Path(__file__).parents[1]
LIMIT = 480  # seconds for everything
RUN_LIMITS = {"cuda": 180, "cpu": 1800}  # seconds for one training; a busy CPU takes long
SYSTEMS = ("solq", "soit", "isda", "istr", "istr_smt", "sotr")
BENCHMARKS = ("attention", "matching", "twin", "inference", "training")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TRAINING = {"train.epochs": 4, "train.log-every": 1, "train.batch-size": 4, "train.reference-batch-size": 4, "data.workers": 0}
TRAIN_IMAGES = 16
EPOCH_STEPS = TRAIN_IMAGES // 4


@dataclass(frozen=True)
class Outcome:
    """The result of a check.

    Attributes:
        error: difference from the expected result; None if the check has no single number.
        allowed: greatest error with which the check passes.
        detail: further figures, as text.
    """

    error: float | None = None
    allowed: float | None = None
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether the error is within bounds; NaN is not."""
        return self.error is None or self.allowed is None or self.error <= self.allowed


Check = Callable[[], Outcome]


def run(device: str, quick: bool, out: Path | None) -> int:
    """Run all checks, print a table, write `out`/gpu.json if asked for, and return 1 if a check failed, else 0.

    Args:
        device: "cuda", or "cpu" for a rehearsal.
        quick: only the checks that take seconds.
        out: folder of the results.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    limit = LIMIT if device == "cuda" else float("inf")  # a rehearsal takes as long as the CPU does
    start, results, reports = time.monotonic(), [], list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        for name, check in checks(device, quick, Path(folder), reports):
            results.append(outcome(name, check, seconds_left=limit - (time.monotonic() - start)))
    failed = [result["check"] for result in results if not result["passed"]]
    minutes = (time.monotonic() - start) / 60
    print(f"\n{len(results) - len(failed)} of {len(results)} checks passed in {minutes:.1f} minutes on {device}.")
    if failed:
        print(f"failed: {', '.join(failed)}")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        command = f"python -m benchmarks gpu{'' if device == 'cuda' else f' --device {device}'}{' --quick' * quick}"
        content = {"command": command, "device": device, "minutes": minutes, **where(), "checks": results, "reports": reports}
        with atomic_write(out / "gpu.json") as part:
            part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"written: {out / 'gpu.json'}")
    return 1 if failed else 0


def outcome(name: str, check: Check, seconds_left: float) -> dict[str, Any]:
    """Run one check and return its row; an exception means that it failed."""
    start = time.monotonic()
    try:
        if seconds_left <= 0:
            raise TimeoutError(f"not run: the checks before it took all of the {LIMIT} seconds.")
        measured = check()
        passed = measured.passed
    except Exception as error:  # the other checks must run
        measured, passed = Outcome(detail=f"{type(error).__name__}: {error}"), False
        if not isinstance(error, (TimeoutError, AssertionError)):
            traceback.print_exc()
    row = {"check": name, "passed": passed, "seconds": round(time.monotonic() - start, 2), **asdict(measured)}
    error = "" if measured.error is None else f"error {measured.error:.2g}"
    error += "" if measured.allowed is None else f" (allowed {measured.allowed:.2g})"
    detail = " ".join(measured.detail.split())[:160]
    print(f"{'passed' if passed else 'FAILED'}  {row['seconds']:6.1f} s  {name:44} {error} {detail}".rstrip(), flush=True)
    return row


def checks(device: str, quick: bool, folder: Path, reports: list[dict[str, Any]]) -> Iterator[tuple[str, Check]]:
    """Yield all checks with their names, short ones first."""
    for name in usable(device):
        for dtype in DTYPES[:2] if quick else DTYPES:
            yield f"attention, {name}, {str(dtype).removeprefix('torch.')}", partial(compare_attention, name, dtype, device)
    yield "DDP in one process, gradients", partial(measure.in_new_process, ddp_gradients, device)
    yield "peak memory, SOLQ", partial(peak_memory, device, quick)
    yield "losses as on the CPU, Sextant", partial(losses_of_sextant, device)
    if quick:
        return
    yield "training in bfloat16, killed and resumed", partial(killed_and_resumed, device, folder)
    yield "training with torchrun, one process", partial(with_torchrun, device, folder)
    for name in BENCHMARKS:
        yield f"benchmark, {name}", partial(benchmark, name, device, reports)
    for system in SYSTEMS:
        yield f"official numbers, {system}", partial(parity, system, device)


def usable(device: str) -> list[str]:
    """Return the implementations of attention for a device; in a rehearsal also Triton's, interpreted."""
    fused = [name for name, reason in implementations().items() if FUSED.get(name) == device and reason is None]
    return list(dict.fromkeys([*fused, "triton", *PLAIN]))


def compare_attention(name: str, dtype: torch.dtype, device: str) -> Outcome:
    """Compare output and gradients with those of the plain version in float64 on the CPU, relative to the greatest value."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    sample = attention.sample((32, 48), 2, 40, "cpu").cast(exact)
    sample = sample if device == "cuda" else part(sample)
    sample = replace(sample, value=sample.value.to(dtype), gradient=sample.gradient.to(dtype))
    plain = attention.with_gradients(
        lambda s: by_grid_sample(s.value, s.shapes, s.locations, s.weights), sample.cast(torch.float64)
    )
    tensors = {key: getattr(sample, key).to(device) for key in ("value", "locations", "weights", "gradient")}
    fast = computed(name, replace(sample, **tensors), device)
    errors = [(a.double().cpu() - b).abs().max() / b.abs().max() for a, b in zip(fast, plain, strict=True)]
    rounding = torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0
    return Outcome(torch.stack(errors).max().item(), rounding + (1e-12 if dtype == torch.float64 else 2e-5))


def part(sample: attention.Sample) -> attention.Sample:
    """Return 2 queries, heads, levels and points of a sample: Triton's interpreter takes a second for so many."""
    few = {"shapes": sample.shapes[:2], "value": sample.value[:, : sum(h * w for h, w in sample.shapes[:2]), :2]}
    few |= {name: getattr(sample, name)[:, :2, :2, :2, :2] for name in ("locations", "weights")}
    return attention.Sample(**few, gradient=sample.gradient[:, :2, : 2 * attention.WIDTH])


def computed(name: str, sample: attention.Sample, device: str) -> tuple[Tensor, ...]:
    """Return output and gradients of one implementation."""
    if name != "triton" or device == "cuda":
        return attention.with_gradients(partial(attention.ours, name), sample)
    from maskset.kernels import attention_triton as kernels

    inputs = (sample.value, sample.shapes, sample.locations, sample.weights)
    return kernels.forward(*inputs), *kernels.backward(sample.gradient, *inputs)


def ddp_gradients(device: str) -> Outcome:
    """Compare a model's gradients with those under DistributedDataParallel in a group of one process."""
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(0)
    model = build(replace(recipes.get("solq-tiny").model, dropout=0.0)).train().to(device)
    images, targets = example(model, (64, 96), objects=3, images=2)
    batch = images.to(device), [one.to(device) for one in targets]

    def gradient(network: nn.Module) -> Tensor:
        model.zero_grad()
        torch.stack(list(model.loss(network(batch[0]), *batch).values())).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if device == "cuda" else "gloo"
        distributed.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        alone = gradient(model)
        together = gradient(DistributedDataParallel(model))
        distributed.destroy_process_group()
    error = ((together - alone).abs().max() / alone.abs().max()).item()
    return Outcome(error, 1e-4, f"backend {backend}")


def losses_of_sextant(device: str) -> Outcome:
    """Compare the losses of Sextant, which has no official numbers, with those on the CPU, relative to the greatest."""
    torch.manual_seed(0)
    model = build(recipes.get("sextant-tiny").model).eval()
    images, targets = example(model, (64, 96), objects=10, images=2)
    losses = []
    for place in ("cpu", device):
        batch = images.to(place), [objects.to(place) for objects in targets]
        losses.append(torch.stack(list(model.to(place).loss(model(batch[0]), *batch).values())).detach().cpu())
    return Outcome(((losses[1] - losses[0]).abs().max() / losses[0].max()).item(), 1e-4)


def peak_memory(device: str, quick: bool) -> Outcome:
    """Measure the greatest memory of tensors in inference and in a training step of SOLQ, above model and batch."""
    small = quick or device == "cpu"
    torch.manual_seed(0)
    model = build(recipes.get("solq-tiny" if small else "solq-r50").model).to(device)
    images, targets = example(model, (64, 96) if small else (800, 1066), objects=10, images=2)
    batch = images.to(device), [one.to(device) for one in targets]

    def inference() -> Any:
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16):
            return model.eval()(batch[0])

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = total(model.train(), batch)
        loss.backward()
        model.zero_grad()

    peaks = measure.peaks({"inference": inference, "training step": step})
    assert all(0 < peak < 2**20 for peak in peaks.values()), peaks
    size = " x ".join(str(side) for side in batch[0].pixels.shape)
    return Outcome(detail=f"{size}, bfloat16: " + ", ".join(f"{name} {peak:,.0f} MiB" for name, peak in peaks.items()))


def killed_and_resumed(device: str, folder: Path) -> Outcome:
    """Compare the last loss of a run that was killed in its second epoch and resumed with that of a whole run."""
    whole, killed = folder / "whole", folder / "killed"
    call(train(folder, whole), device)
    process = subprocess.Popen(
        train(folder, killed), env=environment(device), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + RUN_LIMITS[device]
    while len(losses(killed)) <= EPOCH_STEPS and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -9, f"the run ended with exit code {process.returncode} before it could be killed"
    before = len(losses(killed))
    assert before > EPOCH_STEPS, f"the run did not reach its second epoch in {RUN_LIMITS[device]} seconds"
    call([*train(folder, killed), "--resume"], device)
    one, other = losses(whole), losses(killed)
    assert len(one) == len(other), f"{len(one)} steps in one run, {len(other)} in the killed one"
    allowed = 0.2 if device == "cuda" else 0.0  # sums on a GPU are not in a fixed order
    detail = f"killed after {before} of {len(one)} steps, loss {other[-1]:.4g}"
    return Outcome(abs(one[-1] - other[-1]) / abs(one[-1]), allowed, detail)


def with_torchrun(device: str, folder: Path) -> Outcome:
    """Train as `torchrun` starts it, in a group of one process (NCCL on a GPU)."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    call([*torchrun, *train(folder, folder / "torchrun")[1:]], device)
    return Outcome(detail=f"last loss {losses(folder / 'torchrun')[-1]:.4g}")


def train(folder: Path, run: Path) -> list[str]:
    """Return the command that trains a tiny SOLQ in bfloat16 on generated images."""
    if not (folder / "data").exists():
        shapes.write(folder / "data", {"train": TRAIN_IMAGES, "val": 4}, size=(64, 64))
    settings = [word for name, value in TRAINING.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "maskset", "train", "solq-tiny", "--data", str(folder / "data"), "--out", str(run)]
    return [*command, "--train.precision", "bf16", *settings]


def losses(run: Path) -> list[float]:
    """Return the loss of every logged training step of a run; none before its first."""
    file = run / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]  # the last may be incomplete
    return [line["loss"] for line in lines if line["split"] == "train"]


def benchmark(name: str, device: str, reports: list[dict[str, Any]]) -> Outcome:
    """Run a benchmark, on a GPU for a short time, and keep its report."""
    import importlib

    module, report = importlib.import_module(f"benchmarks.{name}"), Report(name, "")
    measure.MOST_SECONDS = 5.0
    module.run(report, quick=device == "cpu")
    reports.append(report.to_dict(f"python -m benchmarks {name}", time.monotonic()))
    return Outcome(
        detail="; ".join(f"{one.comparison}: {one.measured:.3g}x" for one in report.targets if one.measured is not None)
    )


def parity(system: str, device: str) -> Outcome:
    """Compare a system on a device with the arrays of the official code, as its parity tests do."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.xml"
        tests = [f"tests/systems/test_{system}_parity.py", "-m", "not slow", "-q", f"--junitxml={file}", "-p", "no:cacheprovider"]
        env = environment(device) | {"MASKSET_TEST_DEVICE": device}
        subprocess.run([sys.executable, "-m", "pytest", *tests], cwd=ROOT, env=env, capture_output=True, timeout=300)
        suite = ElementTree.parse(file).getroot()[0]
    failures = [
        (case.get("name"), part.get("message") or "") for case in suite for part in case if part.tag in ("failure", "error")
    ]
    count = int(suite.get("tests", 0))
    first = "".join(f"; {name}: {' '.join(message.split())[:200]}" for name, message in failures[:3])
    return Outcome(len(failures) if count else 1, 0, f"{count - len(failures)} of {count} tests passed{first}")


def environment(device: str) -> dict[str, str]:
    """Return the environment of a process that computes on a device; in it Triton does not interpret."""
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), *filter(None, [variables.get("PYTHONPATH")])])
    return variables if device == "cuda" else variables | {"CUDA_VISIBLE_DEVICES": ""}


def call(command: list[str], device: str) -> None:
    """Run a command; if it fails, so does the check, with the last lines that it wrote."""
    ended = subprocess.run(command, env=environment(device), capture_output=True, text=True, timeout=RUN_LIMITS[device])
    assert ended.returncode == 0, f"exit code {ended.returncode}: {ended.stderr[-500:]}"
