import pytest
import torch

from maskset.errors import ConfigError, MaskError
from maskset.masks.codecs.autoencoder import AutoencoderCodec
from maskset.masks.codecs.logit_pca import LogitPcaCodec
from maskset.masks.codecs.pca import PcaCodec
from maskset.masks.codecs.sparse import SparseCodec


def test_rows_do_not_depend_on_the_batches():
    masks = torch.arange(10 * 4).view(10, 2, 2)
    for batches in (masks, [masks], masks.split(1), masks.split(3), [masks[:0], *masks.split(4)]):
        parts = list(PcaCodec(2, 1).rows(batches, 4))
        assert [len(part) for part in parts] == [4, 4, 2]
        assert torch.equal(torch.cat(parts), masks.flatten(1))


def test_no_masks_give_no_rows():
    assert list(PcaCodec(2, 1).rows([], 4)) == []
    assert list(PcaCodec(2, 1).rows(torch.zeros(0, 2, 2), 4)) == []


def test_reading_stops_when_there_are_enough_masks():
    read = []

    def batches():
        for i in range(9):
            read.append(i)
            yield torch.full((2, 1, 1), i)

    assert torch.cat(list(PcaCodec(1, 1).rows(batches(), 4, max_masks=5))).flatten().tolist() == [0, 0, 1, 1, 2]
    assert read == [0, 1, 2]


CODECS = [PcaCodec(32, 3), LogitPcaCodec(32, 3), SparseCodec(32, 3), AutoencoderCodec(32, 3)]


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.kind)
def test_masks_of_another_size_or_with_nan_are_refused_and_leave_the_codec_unfitted(codec):
    with pytest.raises(MaskError, match=r"needs masks of shape \[n, 32, 32\], got \[9, 28, 28\]"):
        codec.fit(torch.zeros(9, 28, 28))
    for value in (torch.nan, torch.inf):
        with pytest.raises(MaskError, match="not finite"):
            codec.fit([torch.zeros(9, 32, 32), torch.full((1, 32, 32), value)])
    assert not codec.fitted


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.kind)
def test_weights_of_a_codec_that_is_not_fitted_are_refused_after_those_of_a_fitted_one(codec):
    fresh = {name: value.clone() for name, value in codec.state_dict().items()}
    codec.load_state_dict({**fresh, "fitted": torch.tensor(True)})
    codec.decode(torch.zeros(1, 3))
    torch.nn.ModuleDict({"codec": codec}).load_state_dict({f"codec.{name}": value for name, value in fresh.items()})
    with pytest.raises(ConfigError, match="has not been fitted"):
        codec.decode(torch.zeros(1, 3))
