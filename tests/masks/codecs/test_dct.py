import numpy as np
import pytest
import scipy.fft
import torch
from goldens import ellipses, golden, unpacked

from maskset.errors import ConfigError
from maskset.instances import Masks
from maskset.masks.codecs.dct import DctCodec, dct_basis, zigzag
from maskset.masks.paint import binarize, paste
from maskset.masks.targets import crop


def test_the_scan_is_the_official_one():
    assert zigzag(8) == golden("solq", "dct.zigzag8").tolist()
    assert zigzag(128)[:256] == golden("solq", "dct.zigzag").tolist()
    assert zigzag(128)[-16:] == golden("solq", "dct.zigzag.tail").tolist()


def test_the_basis_is_orthonormal():
    basis = dct_basis(128)
    torch.testing.assert_close(basis @ basis.T, torch.eye(128, dtype=torch.float64))


@pytest.mark.parametrize(("size", "length"), [(8, 64), (8, 1), (28, 100), (128, 256), (5, 7)])
def test_codes_are_the_first_of_scipys_transform_and_decode_to_its_inverse(size, length):
    codec = DctCodec(size, length)
    masks = torch.rand(3, size, size, generator=torch.Generator().manual_seed(0))
    kept = zigzag(size)[:length]
    spectrum = scipy.fft.dctn(masks.numpy(), norm="ortho", axes=(1, 2)).reshape(3, -1)
    codes = codec.encode(masks)
    np.testing.assert_allclose(codes, spectrum[:, kept], atol=2e-5)
    cut = np.zeros_like(spectrum)
    cut[:, kept] = spectrum[:, kept]
    expected = scipy.fft.idctn(cut.reshape(3, size, size), norm="ortho", axes=(1, 2))
    np.testing.assert_allclose(codec.decode(codes), expected, atol=2e-5)


def test_square_masks_are_coded_as_officially():
    codec, masks = DctCodec(), ellipses("solq-dct", 128, 128, 6)
    codes = codec.encode(masks.float())
    torch.testing.assert_close(codes, golden("solq", "dct.square.vectors"), atol=1e-4, rtol=0)
    fields = codec.decode(codes)
    torch.testing.assert_close(fields[:2], golden("solq", "dct.square.soft"), atol=1e-5, rtol=0)
    decoded = binarize(fields)
    assert torch.equal(decoded, unpacked("solq", "dct.square.binary_packed", 128))
    iou = (decoded & masks).sum((1, 2)) / (decoded | masks).sum((1, 2))
    torch.testing.assert_close(iou, golden("solq", "dct.square.iou"), atol=1e-6, rtol=0)


@pytest.mark.parametrize("boxes", ["tight", "loose"])
def test_crop_code_and_paste_are_the_official_ones(boxes):
    codec, image = DctCodec(), ellipses("solq-dct-image", 192, 256, 5)
    corners = golden("solq", f"dct.{boxes}.boxes")
    crops = crop(Masks.from_dense(image), corners, 128)
    assert torch.equal(crops, unpacked("solq", f"dct.{boxes}.crop_packed", 128))
    codes = codec.encode(crops.float())
    torch.testing.assert_close(codes, golden("solq", f"dct.{boxes}.vectors"), atol=1e-4, rtol=0)
    decoded = binarize(codec.decode(codes))
    assert torch.equal(decoded, unpacked("solq", f"dct.{boxes}.decoded_packed", 128))
    pasted = paste(decoded, corners, (192, 256)).dense()
    assert torch.equal(pasted, unpacked("solq", f"dct.{boxes}.pasted_packed", 256))


def test_an_empty_mask_stays_empty():
    codec = DctCodec(16, 20)
    assert codec.encode(torch.zeros(2, 16, 16)).abs().sum() == 0
    assert not binarize(codec.decode(torch.zeros(2, 20))).any()


@pytest.mark.parametrize("length", [0, 65, -1])
def test_a_length_that_is_not_there_is_refused(length):
    with pytest.raises(ConfigError, match="1 to 64"):
        DctCodec(8, length)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_codec_stays_in_float32_in_a_module_of_another_dtype_and_still_moves(dtype):
    codec, codes = DctCodec(8, 12), torch.rand(2, 12)
    expected = codec.decode(codes)
    module = torch.nn.Sequential(codec, torch.nn.Linear(1, 1)).to(dtype)
    assert module[1].weight.dtype == dtype
    assert torch.equal(codec.decode(codes), expected)
    assert {buffer.device.type for buffer in module.to("meta", dtype).buffers()} == {"meta"}
