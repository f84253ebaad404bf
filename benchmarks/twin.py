"""Twin attention, along columns and then along rows, against attention among all cells: forward and backward.

A grid of N x N cells, 256 wide, 8 heads, one image, float32. "plain" makes the matrix of attention weights, as the released code
does; the others use PyTorch's fused attention, which never has it whole. Then the released transformer of 12 layers: with its
copies computed whole in all layers, as the released code does, and with the columns that are alike computed once.
"""

from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measure import Implementation, in_turn, peaks
from benchmarks.report import Report
from maskset.layers.twin import Attention, ReleasedLayer, ReleasedTransformer

WIDTH, HEADS, DEPTH = 256, 8, 12
FULL, DOUBLED = "full, plain", "copies whole"


def run(report: Report, quick: bool) -> None:
    """Measure both attentions, and both implementations of the released transformer."""
    seconds, depth = (0, 2) if quick else (12, DEPTH)
    for side in (6, 8) if quick else (12, 24, 40, 60):
        compare(report, f"attention, {side} x {side} cells", FULL, attentions(side), seconds)
    for side in (6,) if quick else (12, 24, 40):
        compare(report, f"released transformer, {side} x {side} cells", DOUBLED, transformers(side, depth), seconds)
    report.note(
        "The paper reports 1.24 times the speed and 2.0 times less memory for the whole model at depth 12. What the twin "
        "saves in memory, fused attention saves as well, for full attention too."
    )


def compare(
    report: Report, case: str, baseline: str, implementations: Mapping[str, tuple[nn.Module, Tensor]], seconds: float
) -> None:
    """Compare implementations; those whose names begin alike compute the same."""
    agree(report, case, implementations)
    steps = {name: step(module, x, name.endswith("plain")) for name, (module, x) in implementations.items()}
    report.compare(case, baseline, in_turn(steps, seconds), peaks(steps))


def agree(report: Report, case: str, implementations: Mapping[str, tuple[nn.Module, Tensor]]) -> None:
    """Check each implementation against the one that uses the whole matrix, or all columns."""
    outputs = {}
    for name, (module, x) in implementations.items():
        with torch.no_grad(), sdpa_kernel(backends(name.endswith("plain"))):
            outputs[name] = module(x)
    for name, same in (("full", "full, plain"), ("twin", "twin, plain"), ("columns once", DOUBLED)):
        if name in outputs:
            apart = (outputs[name] - outputs[same]).abs().max() / outputs[same].abs().max()
            report.agree(f"{case}: {name} and {same}, relative to the greatest value", apart.item(), 1e-4)


def attentions(side: int) -> dict[str, tuple[nn.Module, Tensor]]:
    """Return the attentions with a map [1 N N C]."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    full = Attention(WIDTH, HEADS, "map").to(device)
    twin = nn.Sequential(Attention(WIDTH, HEADS, "columns"), Attention(WIDTH, HEADS, "rows")).to(device)
    x = torch.randn(1, side, side, WIDTH, device=device)
    return {FULL: (full, x), "full": (full, x), "twin, plain": (twin, x), "twin": (twin, x)}


def transformers(side: int, depth: int) -> dict[str, tuple[nn.Module, Tensor]]:
    """Return both implementations of the released transformer with a map [1 C N N]."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    transformer = ReleasedTransformer(WIDTH, HEADS, depth)
    for layer in transformer.layers:
        assert isinstance(layer, ReleasedLayer)
        nn.init.constant_(layer.gates, 0.1)  # they are initialized with zero, where all implementations return the input
    transformer, x = transformer.to(device), torch.randn(1, WIDTH, side, side, device=device)
    doubled = deepcopy(transformer)
    doubled.fast = False
    return {DOUBLED: (doubled, x), "columns once": (transformer, x)}


def step(module: nn.Module, x: Tensor, plain: bool) -> Implementation:
    """Return a forward and backward pass."""
    parameters = list(module.parameters())

    def call() -> tuple[Tensor, ...]:
        with sdpa_kernel(backends(plain)):
            given = x.detach().requires_grad_()
            return torch.autograd.grad(module(given).square().mean(), [given, *parameters])

    return call


def backends(plain: bool) -> list[SDPBackend]:
    """Return the backends that PyTorch may use: only the plain one, or all."""
    return [SDPBackend.MATH] if plain else [*SDPBackend.__members__.values()][1:]
