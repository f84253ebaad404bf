"""Time and memory of twin attention against full attention; written to results/twin_attention.json.

    python benchmarks/twin_attention.py [N ...]

One attention on a grid of N x N cells, 256 wide, 8 heads, one image, float32: forward and backward. Each figure comes from a
process of its own, on a GPU where there is one, else on the CPU on one thread. Memory is the greatest that PyTorch's allocator
gave out above module and input, so neither libraries nor caches count. `plain` makes the attention matrix, as the released code
does; the others use PyTorch's fused attention, which never has it whole. The last two are the released transformer: with its
copies computed whole in all layers, as the released code does, and with the columns that are alike computed once.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from maskset.layers.twin import Attention, Copies, ReleasedTransformer

RESULT = Path(__file__).parent / "results" / "twin_attention.json"
WIDTH, HEADS, DEPTH, REPEATS = 256, 8, 12, 5
SIDES = [12, 16, 24, 36, 40, 48, 60]
WAYS = {
    "full": "every cell sees all cells, fused",
    "full, plain": "the same, with the attention matrix",
    "twin": "columns, then rows, fused",
    "twin, plain": "the same, with the attention matrices",
    "released, doubled": f"{DEPTH} layers of the released transformer, convolutions included, the copies computed whole",
    "released": "the same, columns that are alike computed once",
}


class Doubled(nn.Module):
    """The released transformer, without using that its copies are alike at first."""

    def __init__(self, transformer: ReleasedTransformer) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, level: Tensor) -> Tensor:
        """Return a map of the same size."""
        x = torch.cat([level, level], 3).permute(0, 2, 3, 1).contiguous()
        for layer in self.transformer.layers:
            x, _ = layer(x, WholeCopies(level.shape[3]))
        return x.permute(0, 3, 1, 2).unflatten(3, (2, -1)).mean(3)


class WholeCopies(Copies):
    """Two copies of which all columns are kept."""

    @property
    def whole(self) -> bool:
        """Whether all columns of both copies are kept."""
        return True

    def after_convolutions(self, x: Tensor) -> tuple[Tensor, Copies]:
        """Return the map as it is."""
        return x, self


def made(way: str) -> nn.Module:
    """Return the module that a way measures; maps of attention are [B h w C], of a transformer [B C h w]."""
    kind = way.partition(",")[0]
    if kind == "full":
        return Attention(WIDTH, HEADS, "map")
    if kind == "twin":
        return nn.Sequential(Attention(WIDTH, HEADS, "columns"), Attention(WIDTH, HEADS, "rows"))
    transformer = ReleasedTransformer(WIDTH, HEADS, DEPTH)
    for layer in transformer.layers:
        nn.init.constant_(layer.gates, 0.1)
    return Doubled(transformer) if way == "released, doubled" else transformer


def measure(way: str, side: int) -> dict[str, float]:
    """Return the least time of some repeats and the greatest memory of one, forward and backward, in this process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    module = made(way).to(device)
    shape = (1, WIDTH, side, side) if way.startswith("released") else (1, side, side, WIDTH)
    x = torch.randn(shape, device=device, requires_grad=True)
    backends = [SDPBackend.MATH] if way.endswith("plain") else [*SDPBackend.__members__.values()][1:]

    def step() -> None:
        module.zero_grad()
        x.grad = None
        with sdpa_kernel(backends):
            module(x).square().mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    step()  # the first one is slower
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    module.zero_grad()
    x.grad = None
    return {"milliseconds": round(1000 * min(seconds), 3), "peak_mib": round(peak(step, device) / 2**20, 2)}


def peak(step: Callable[[], None], device: torch.device) -> float:
    """Return by how many bytes PyTorch's allocator rises above its start in one step."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    now = highest = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest


def processor() -> str:
    """Return what the machine computes with: the GPU, or what Linux calls the processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def main(sides: list[int]) -> None:
    """Measure everything and write it down."""
    figures = []
    for side in sides:
        for way, meaning in WAYS.items():
            run = subprocess.run(
                [sys.executable, __file__, "--one", way, str(side)],
                env={**os.environ, "OMP_NUM_THREADS": "1", "KINETO_LOG_LEVEL": "99"},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            figures.append({"side": side, "way": way, "meaning": meaning, **json.loads(run.stdout)})
            print(json.dumps(figures[-1]), flush=True)
    head = ["git", "describe", "--always", "--dirty"]
    written = {
        "machine": {"processor": processor(), "cores": os.cpu_count(), "python": platform.python_version()},
        "versions": {"torch": importlib.metadata.version("torch")},
        "commit": subprocess.run(head, capture_output=True, text=True, check=True, cwd=Path(__file__).parent).stdout.strip(),
        "command": " ".join(["python", "benchmarks/twin_attention.py", *map(str, [] if sides == SIDES else sides)]),
        "step": f"one image, N x N cells, {WIDTH} wide, {HEADS} heads, float32, forward and backward, best of {REPEATS}",
        "figures": figures,
    }
    RESULT.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(sys.argv[2], int(sys.argv[3]))))
    else:
        main([int(side) for side in sys.argv[1:]] or SIDES)
