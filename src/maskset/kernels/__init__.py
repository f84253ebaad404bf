"""Every fast path: the C library, the Triton kernels, and the PyTorch operators that run them.

The plain twin defines the result; the test compares both. All tests are in tests/kernels unless a path is given.

| fast path | plain twin | test |
|---|---|---|
| csrc/attention.c, by `attention` | `attention_plain.by_samples` | tests/layers/test_deformable.py |
| `attention_triton` | `attention_plain.by_samples` | test_attention_triton.py; `self_check` at first use |
| csrc/instances.c, by `instances` | `masks.heads.instance_transformer` | tests/masks/heads/test_instance_transformer.py |
| csrc/runs.c, by `runs` | `rle` | test_runs.py |
| csrc/polygons.c, by `runs.rasterized` | pycocotools, in `rle.rasterize` | test_runs.py |
| csrc/fields.c, `fields_paste`, by `fields` | `masks.paint.paste_soft` | test_fields.py |
| csrc/fields.c, the others, by `fields` | `masks.paint.paint` | test_fields.py |
| csrc/targets.c, by `targets` | `masks.targets` | test_targets.py |
| `twin` | `layers.twin.ReleasedTransformer`, not `fast` | tests/layers/test_twin.py |

The checks before C reads its arguments are tested in test_checks.py and, for every exported function, in test_sanitizers.py.
MASKSET_NATIVE=off disables the C library, MASKSET_ATTENTION names one implementation of deformable attention.
"""
