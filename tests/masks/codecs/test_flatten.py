import pytest
import torch

from maskset.errors import ConfigError
from maskset.masks.codecs import MaskCodec
from maskset.masks.codecs.flatten import FlattenCodec
from maskset.masks.paint import binarize


def test_a_code_is_the_pixels_row_by_row():
    codec = FlattenCodec(3)
    masks = torch.arange(18.0).view(2, 3, 3)
    assert codec.length == 9
    assert codec.encode(masks).tolist() == [list(range(9)), list(range(9, 18))]


def test_flatten_reconstructs_masks_exactly():
    codec = FlattenCodec(28)
    masks = torch.rand(5, 28, 28, generator=torch.Generator().manual_seed(0)) > 0.5
    assert torch.equal(binarize(codec.decode(codec.encode(masks.float()))), masks)


def test_no_masks_have_no_codes():
    codec = FlattenCodec(4)
    assert codec.encode(torch.zeros(0, 4, 4)).shape == (0, 16)
    assert codec.decode(torch.zeros(0, 16)).shape == (0, 4, 4)


def test_flatten_is_a_mask_codec():
    assert isinstance(FlattenCodec(), MaskCodec)


def test_a_mask_without_pixels_is_refused():
    with pytest.raises(ConfigError, match="at least 1 pixel, got 0"):
        FlattenCodec(0)
