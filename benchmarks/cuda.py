"""A direct CUDA kernel of deformable attention, and the copy bandwidth of a GPU: what Triton's kernels are compared with.

One warp for each batch element, query and head, one thread for each of its 32 channels: the same walk as the official kernel,
written anew. Compiled when it is needed, where nvcc is.
"""

import shutil
from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.measure import in_turn
from benchmarks.report import Report

if TYPE_CHECKING:
    from benchmarks.attention import Sample

_NAME = "CUDA kernel"
_SOURCE = r"""
#include <torch/extension.h>
#include <c10/cuda/CUDAStream.h>

// Calls f(cell, x share, y share, its sign in x, in y) for the cells around a place that lie in the level.
template <class F> __device__ void around(float x, float y, int h, int w, F f) {
  int left = floorf(x), top = floorf(y);
  float fx = x - left, fy = y - top;
  for (int c = 0; c < 4; c++) {
    int i = left + (c & 1), j = top + (c >> 1);
    if (i >= 0 && i < w && j >= 0 && j < h)
      f((int64_t)j * w + i, c & 1 ? fx : 1 - fx, c >> 1 ? fy : 1 - fy, c & 1 ? 1.f : -1.f, c >> 1 ? 1.f : -1.f);
  }
}
__device__ float over_warp(float v) {
  for (int k = 16; k; k >>= 1) v += __shfl_down_sync(0xffffffffu, v, k);
  return v;
}
template <bool BACKWARD> __global__ void walk(
    const float* value, const int* shapes, const float* places, const float* weights, const float* gradient,
    float* out, float* g_value, float* g_places, float* g_weights, int64_t rows, int S, int Q, int M, int L, int P) {
  int64_t row = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
  if (row >= rows) return;
  const int D = 32, d = threadIdx.x, m = row % M;
  int64_t start = row / ((int64_t)M * Q) * S;
  float sum = 0, g = BACKWARD ? gradient[row * D + d] : 0;
  for (int l = 0; l < L; l++) {
    int h = shapes[2 * l], w = shapes[2 * l + 1];
    for (int p = 0; p < P; p++) {
      int64_t k = (row * L + l) * P + p;
      float x = places[2 * k] * w - .5f, y = places[2 * k + 1] * h - .5f, a = weights[k], s = 0, sx = 0, sy = 0;
      if (x > -1 && y > -1 && x < w && y < h)
        around(x, y, h, w, [&](int64_t cell, float tx, float ty, float dx, float dy) {
          int64_t at = ((start + cell) * M + m) * D + d;
          float v = value[at];
          s += tx * ty * v; sx += dx * ty * v; sy += dy * tx * v;
          if (BACKWARD) atomicAdd(g_value + at, tx * ty * a * g);
        });
      if (BACKWARD) {
        s = over_warp(s * g); sx = over_warp(sx * g); sy = over_warp(sy * g);
        if (d == 0) { g_weights[k] = s; g_places[2 * k] = sx * a * w; g_places[2 * k + 1] = sy * a * h; }
      } else sum += a * s;
    }
    start += (int64_t)h * w;
  }
  if (!BACKWARD) out[row * D + d] = sum;
}
std::vector<torch::Tensor> call(torch::Tensor v, torch::Tensor shapes, torch::Tensor p, torch::Tensor a,
                                c10::optional<torch::Tensor> gradient) {
  TORCH_CHECK(v.size(3) == 32, "heads of 32 channels only");
  int S = v.size(1), M = v.size(2), Q = p.size(1), L = p.size(3), P = p.size(4);
  int64_t rows = p.size(0) * Q * M;
  dim3 block(32, 8), grid((rows + 7) / 8);
  auto stream = c10::cuda::getCurrentCUDAStream();
  const float *V = v.data_ptr<float>(), *X = p.data_ptr<float>(), *A = a.data_ptr<float>();
  const int* H = shapes.data_ptr<int>();
  if (!gradient) {
    auto out = torch::empty({p.size(0), Q, M * 32}, v.options());
    walk<false><<<grid, block, 0, stream>>>(V, H, X, A, nullptr, out.data_ptr<float>(), nullptr, nullptr, nullptr,
                                            rows, S, Q, M, L, P);
    return {out};
  }
  auto gv = torch::zeros_like(v), gp = torch::empty_like(p), ga = torch::empty_like(a);
  walk<true><<<grid, block, 0, stream>>>(V, H, X, A, gradient->data_ptr<float>(), nullptr, gv.data_ptr<float>(),
                                         gp.data_ptr<float>(), ga.data_ptr<float>(), rows, S, Q, M, L, P);
  return {gv, gp, ga};
}
"""


def attentions(report: Report) -> dict[str, Callable[["Sample"], Tensor]]:
    """Return the kernel as an attention by its name; nothing, with a remark, where it cannot be compiled."""
    if shutil.which("nvcc") is None:
        report.note("The CUDA kernel is not measured: there is no nvcc.")
        return {}
    from torch.utils.cpp_extension import load_inline

    declared = "#include <torch/extension.h>\nstd::vector<torch::Tensor> call(torch::Tensor, torch::Tensor, torch::Tensor, "
    declared += "torch::Tensor, c10::optional<torch::Tensor>);"
    try:
        kernel: Any = load_inline("maskset_bench", declared, cuda_sources=_SOURCE, functions=["call"])
    except (RuntimeError, OSError) as error:
        report.note(f"The CUDA kernel is not measured: it could not be compiled ({str(error).splitlines()[0]}).")
        return {}

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
            ctx.save_for_backward(value, shapes, locations, weights)
            return kernel.call(value, shapes, locations, weights, None)[0]

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
            of_value, of_locations, of_weights = kernel.call(*ctx.saved_tensors, gradients[0].contiguous())
            return of_value, None, of_locations, of_weights

    def attention(sample: "Sample") -> Tensor:
        shapes = torch.tensor(sample.shapes, dtype=torch.int32, device=sample.value.device)
        return Kernel.apply(sample.value.float(), shapes, sample.locations, sample.weights)  # type: ignore[no-any-return]

    return {_NAME: attention}


def bandwidth(report: Report, sample: "Sample", implementations: Sequence[str]) -> None:
    """Add the fraction of the GPU's copy bandwidth that each implementation reaches, for inputs and output counted once."""
    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)
    seconds = median(in_turn({"copy": lambda: target.copy_(source)}, 1.0)["copy"])
    copied = 2 * source.nbytes / seconds / 1e9
    report.note(f"Copying 1 GiB: {copied:,.0f} GB/s.")
    for implementation in implementations:
        found = next(
            (f for f in report.figures if f.case.startswith("encoder, inference") and f.implementation == implementation), None
        )
        if found and found.milliseconds:
            value = sample.value.nbytes // (2 if implementation == "maskset, triton" else 1)  # bfloat16
            moved = value + sample.locations.nbytes + sample.weights.nbytes + sample.gradient.nbytes
            rate = moved / found.milliseconds / 1e6
            report.note(
                f"{implementation}: {moved / 2**20:,.0f} MiB in and out, {rate:,.0f} GB/s, {100 * rate / copied:.0f} % of a copy."
            )
