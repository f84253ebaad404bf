import pytest
import torch

from maskset.errors import ConfigError
from maskset.masks.codecs import files as codec_files
from maskset.masks.codecs.files import rows
from maskset.masks.codecs.pca import PcaCodec


def test_parts_do_not_depend_on_the_batches():
    masks = torch.arange(10 * 4).view(10, 2, 2)
    for batches in (masks, [masks], masks.split(1), masks.split(3), [masks[:0], *masks.split(4)]):
        parts = list(rows(batches, 4))
        assert [len(part) for part in parts] == [4, 4, 2]
        assert torch.equal(torch.cat(parts), masks.flatten(1))


def test_no_masks_give_no_parts():
    assert list(rows([], 4)) == []
    assert list(rows(torch.zeros(0, 2, 2), 4)) == []


def test_reading_stops_when_there_are_enough():
    read = []

    def batches():
        for i in range(9):
            read.append(i)
            yield torch.full((2, 1, 1), i)

    assert torch.cat(list(rows(batches(), 4, most=5))).flatten().tolist() == [0, 0, 1, 1, 2]
    assert read == [0, 1, 2]


def test_a_file_that_is_none_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read as a mask code"):
        codec_files.load(PcaCodec(4, 2), tmp_path / "missing.safetensors")
    (tmp_path / "text").write_text("this is no code")
    with pytest.raises(ConfigError, match="text cannot be read as a mask code"):
        codec_files.load(PcaCodec(4, 2), tmp_path / "text")
