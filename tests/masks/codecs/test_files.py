import pytest

from maskset.errors import ConfigError
from maskset.masks.codecs import files as codec_files
from maskset.masks.codecs.pca import PcaCodec


def test_a_file_that_is_missing_or_not_a_codecs_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read as a mask codec"):
        codec_files.load(PcaCodec(4, 2), tmp_path / "missing.safetensors")
    (tmp_path / "text").write_text("this is no code")
    with pytest.raises(ConfigError, match="text cannot be read as a mask codec"):
        codec_files.load(PcaCodec(4, 2), tmp_path / "text")
