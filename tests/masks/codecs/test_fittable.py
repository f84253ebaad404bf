import pytest
import torch

from maskset.errors import ConfigError, MaskError
from maskset.masks.codecs import MaskCodec
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


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.kind)
def test_all_are_mask_codecs(codec):
    assert isinstance(codec, MaskCodec)


@pytest.mark.parametrize("kind", [PcaCodec, LogitPcaCodec])
def test_a_codec_that_was_not_fitted_says_so(kind):
    with pytest.raises(ConfigError, match=rf"{kind.__name__}\(12, 20\) has not been fitted: call fit"):
        kind(12, 20).encode(torch.zeros(1, 12, 12))
    with pytest.raises(ConfigError, match="has not been fitted"):
        kind(12, 20).decode(torch.zeros(1, 20))


@pytest.mark.parametrize("kind", [PcaCodec, LogitPcaCodec])
@pytest.mark.parametrize("size", [12, 64])  # exact, sketched
@pytest.mark.parametrize("count", [0, 19])
def test_fewer_masks_than_components_are_refused_and_leave_the_codec_unfitted(kind, size, count):
    codec = kind(size, 20)
    with pytest.raises(ConfigError, match=f"20 numbers cannot be fitted to {count} masks"):
        codec.fit(torch.rand(count, size, size) > 0.5)
    assert not codec.fitted


@pytest.mark.parametrize("kind", [PcaCodec, LogitPcaCodec])
@pytest.mark.parametrize(
    ("size", "length", "message"),
    [
        (12, 0, "1 to 144, got 0"),
        (12, 145, "1 to 144, got 145"),
        (0, 1, "1 to 1024, got 0"),
        (10**6, 9, "1 to 1024, got 1000000"),
    ],
)
def test_sizes_and_lengths_that_no_components_have_are_refused(kind, size, length, message):
    with pytest.raises(ConfigError, match=message):
        kind(size, length)
