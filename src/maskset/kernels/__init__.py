"""Every fast path: the C library, the Triton kernels, and the PyTorch operators that run them.

The plain version defines the result; the test compares both. All tests are in tests/kernels unless a path is given.

| fast path | plain version | test |
|---|---|---|
| csrc/attention.c, by `attention` | `attention_plain.by_grid_sample` | tests/layers/test_deformable.py |
| `attention_triton` | `attention_plain.by_grid_sample` | test_attention_triton.py; `self_check` at first use |
| csrc/instance_transformer.c, by `instance_transformer` | `masks.heads.instance_transformer` | tests/masks/heads |
| csrc/runs.c, by `runs` | `rle` | test_runs.py |
| csrc/polygons.c, by `runs.rasterize` | pycocotools, in `rle.rasterize` | test_runs.py |
| csrc/targets.c, by `runs` | `masks.targets` | test_targets.py |
| csrc/fields.c, `fields_paste`, by `fields` | `masks.paint.paste_soft` | test_fields.py |
| csrc/fields.c, the others, by `fields` | `masks.paint.paint` | test_fields.py |
| `twin` | `layers.twin.ReleasedTransformer` with `fast = False` | tests/layers/test_twin.py |

The checks before C reads its arguments are tested in test_checks.py and, for every exported function, in test_sanitizers.py.
MASKSET_NATIVE=off disables the C library, MASKSET_ATTENTION names one implementation of deformable attention.
"""
