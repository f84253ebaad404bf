"""What the Python functions in front of the C library refuse, and what their errors say."""

import ctypes
import importlib.util
import re
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from maskset import rle
from maskset.errors import AttentionError, MasksetError
from maskset.instances import Masks
from maskset.kernels import library, runs
from maskset.kernels.attention import check_attention
from maskset.masks.paint import paint_probabilities, paste_soft
from maskset.masks.targets import crop, downsample_by_stride, resize_align_corners


@pytest.mark.parametrize("boxes", [torch.ones(3, 0), torch.ones(3, 3), torch.ones(3), torch.ones(3, 4, dtype=torch.bool)])
def test_wrong_boxes_are_named_in_the_error(boxes):
    if why := library.unavailable_reason():
        pytest.skip(why)
    masks = Masks.from_dense(torch.ones(3, 5, 6, dtype=torch.bool))
    got = re.escape(f"got shape {list(boxes.shape)}, {str(boxes.dtype).removeprefix('torch.')}")
    with pytest.raises(MasksetError, match=rf"boxes must be a tensor of shape \[3, 4\].*{got}"):
        without_shape_checks(runs.crop)(masks.to_c_view(), boxes, 28)


@pytest.mark.parametrize("shapes", [((10**6, 10**6), (-(10**6), 10**6), (2, 3)), ((-2, -3),)])
def test_levels_with_negative_sides_are_refused(shapes):
    samples = (1, 2, 1, len(shapes), 1)
    with pytest.raises(AttentionError, match="do not fit levels of"):
        without_shape_checks(check_attention)(torch.ones(1, 6, 1, 2), shapes, torch.ones(*samples, 2), torch.ones(samples))


def test_both_paths_take_every_number_but_zero_for_a_set_pixel(both):
    labels = torch.tensor([[[0, 1, 2, 2], [0, 3, 0, 0]]], dtype=torch.uint8)
    for counts in both(lambda: without_shape_checks(rle.encode)(labels)):
        assert rle.areas(counts).tolist() == [4]


@pytest.mark.parametrize("native", ["on", "off"])
def test_probabilities_are_not_taken_for_masks(native, monkeypatch):
    monkeypatch.setenv(library.NATIVE_ENV, native)
    with pytest.raises(MasksetError, match=r"masks must be boolean \[T h w\], got torch.float32 .*masks > 0.5"):
        without_shape_checks(rle.encode)(torch.rand(1, 2, 3))


def test_the_stamp_is_that_of_the_signatures():
    """A library with other signatures would be called with wrong arguments. If this fails, write the new stamp in both places."""
    folder, declarations = Path(library.__file__).with_name("csrc"), []
    if not folder.exists():
        pytest.skip("an installed package has no sources")
    for path in sorted([*folder.glob("*.c"), *folder.glob("*.h")]):
        text = re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
        declarations += re.findall(r"typedef struct \{[^}]*\}[^;]*;|EXPORT \w[^{;]*\)(?= \{)", text)
    assert len(declarations) > 20
    stamp = zlib.crc32(" ".join(" ".join(declarations).split()).encode()) & 0x7FFFFFFF
    assert f"0x{library.SIGNATURES:08x}" == f"0x{stamp:08x}"
    assert f"#define SIGNATURES 0x{stamp:08x}\n" in (folder / "maskset.h").read_text()


@pytest.mark.parametrize("stamp", [None, 1])
def test_a_library_built_from_other_sources_is_refused(stamp, monkeypatch):
    other = SimpleNamespace() if stamp is None else SimpleNamespace(maskset_signatures=lambda: stamp)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: other)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: SimpleNamespace(origin="library"))
    assert "built from other sources" in library._load()


@pytest.mark.parametrize("native", ["on", "off"])
@pytest.mark.parametrize("shape", [(3, 0), (3, 3), (2, 4), (3,)])
def test_both_paths_refuse_to_crop_to_wrong_boxes(shape, native, monkeypatch):
    monkeypatch.setenv(library.NATIVE_ENV, native)
    masks = Masks.from_dense(torch.ones(3, 5, 6, dtype=torch.bool))
    with pytest.raises(MasksetError, match=rf"shape \[3, 4\], got {re.escape(str(list(shape)))}"):
        without_shape_checks(crop)(masks, torch.ones(shape), 28)


@pytest.mark.parametrize("native", ["on", "off"])
@pytest.mark.parametrize(
    ("fields", "boxes"), [((2, 4, 5), (2, 4)), ((2, 0, 0), (2, 4)), ((4, 4), (4, 4)), ((2, 4, 4), (2, 3)), ((2, 4, 4), (3, 4))]
)
def test_both_paths_refuse_to_paste_wrong_fields_and_boxes(fields, boxes, native, monkeypatch):
    monkeypatch.setenv(library.NATIVE_ENV, native)
    with pytest.raises(MasksetError, match=re.escape(f"got shapes {list(fields)} and {list(boxes)}")):
        without_shape_checks(paste_soft)(torch.ones(fields), torch.ones(boxes), (20, 30), 0.5)


def without_shape_checks(function):
    """Return the function as users call it, without the checks of jaxtyping that the tests add."""
    return getattr(function, "__wrapped__", function)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torchs_default_type_changes_nothing(dtype):
    def results() -> list[torch.Tensor]:
        masks = Masks.from_dense(torch.arange(3 * 40 * 60).view(3, 40, 60) % 7 < 3)
        soft = (torch.arange(2 * 25, dtype=torch.float32) % 9 / 9).view(2, 5, 5)
        boxes = torch.tensor([[1, 2, 30, 20], [0, 0, 9, 9]], dtype=torch.float32)
        resized = resize_align_corners(masks, (48, 64), (12, 16), torch.device("cpu"))
        painted = paint_probabilities(soft, 4, (18, 20), (36, 40)).dense()
        return [downsample_by_stride(masks, 4, (12, 16)), resized, paste_soft(soft, boxes, (40, 50), 0.5).dense(), painted]

    expected = results()
    torch.set_default_dtype(dtype)
    try:
        assert all(torch.equal(a, b) for a, b in zip(results(), expected, strict=True))
    finally:
        torch.set_default_dtype(torch.float32)
