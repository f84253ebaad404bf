import pytest
import torch
from tiny import shapes

from maskset.codec_tools import compare
from maskset.codec_tools.fit import fit_codec
from maskset.errors import ConfigError
from maskset.masks.codecs import MaskCodec, autoencoder
from maskset.masks.codecs import files as codec_files
from maskset.masks.codecs.autoencoder import AutoencoderCodec
from maskset.masks.targets import crop


@pytest.fixture(scope="module")
def masks() -> torch.Tensor:
    return torch.cat([crop(targets.masks, targets.boxes, 32) for _, targets in shapes(20)])


@pytest.fixture(scope="module")
def fitted(masks) -> AutoencoderCodec:
    codec = AutoencoderCodec(32, 16)
    codec.fit(masks, steps=100)
    return codec.eval()


def test_a_fitted_autoencoder_reconstructs_masks(masks, fitted):
    with torch.no_grad():
        drawn = fitted.decode(fitted.encode(masks.float())) >= 0.5
    overlaps = (drawn & masks).sum((1, 2)) / (drawn | masks).sum((1, 2)).clamp(min=1)
    assert overlaps.mean() > 0.7


def test_a_fit_does_not_depend_on_the_global_seed_nor_on_batches(masks):
    states = []
    for seed, parts in ((1, masks), (2, masks.split([10, 0, len(masks) - 10]))):
        torch.manual_seed(seed)
        codec = AutoencoderCodec(32, 16)
        after = torch.get_rng_state()
        codec.fit(parts, steps=2)
        assert torch.equal(torch.get_rng_state(), after)
        states.append(codec.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_the_encoder_is_frozen_once_it_is_fitted_and_the_decoder_is_not(fitted):
    assert not any(parameter.requires_grad for parameter in fitted.encoder.parameters())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in fitted.first.parameters())


def test_context_is_added_where_the_map_is_a_quarter_of_the_mask(fitted):
    codes = torch.randn(3, 16)
    plain, nothing = fitted.decode(codes), fitted.decode(codes, torch.zeros(3, 32, 8, 8))
    assert torch.equal(plain, nothing)
    assert not torch.equal(plain, fitted.decode(codes, torch.ones(3, 32, 8, 8)))


def test_no_mask_at_all_leaves_the_statistics_as_they_are(masks, fitted):
    before = {name: value.clone() for name, value in fitted.state_dict().items()}
    fitted.train()
    drawn = fitted.decode(fitted.encode(masks[:0].float()))
    drawn.sum().backward()
    fitted.eval()
    assert drawn.shape == (0, 32, 32)
    assert all(parameter.grad is not None for parameter in fitted.parameters() if parameter.requires_grad)
    assert all(torch.equal(value, before[name]) for name, value in fitted.state_dict().items())
    fitted.zero_grad()


def test_in_training_a_mask_is_normalized_by_those_beside_it(masks, fitted):
    fitted.train()
    alone, together = fitted.encode(masks[:1].float()), fitted.encode(masks[:9].float())
    fitted.eval()
    assert not torch.allclose(alone, together[:1], atol=1e-3)


def test_an_unfitted_codec_and_a_fit_without_masks_are_refused():
    codec = AutoencoderCodec(32, 16)
    with pytest.raises(ConfigError, match=r"AutoencoderCodec\(32, 16\) has not been fitted"):
        codec.encode(torch.zeros(1, 32, 32))
    with pytest.raises(ConfigError, match="cannot be fitted to 0 masks"):
        codec.fit(iter(()))
    assert not codec.fitted


@pytest.mark.parametrize("was_fitted", [False, True])
def test_an_interrupted_fit_leaves_a_codec_that_is_not_fitted(masks, monkeypatch, was_fitted):
    codec = AutoencoderCodec(32, 8).eval()
    if was_fitted:
        codec.fit(masks, steps=1, progress=False)
        codec.encode(masks[:1].float())
    before = torch.get_rng_state()

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(autoencoder, "squared_dice_loss", interrupt)
    with pytest.raises(KeyboardInterrupt):
        codec.fit(masks, steps=5, progress=False)
    assert not codec.fitted
    assert not codec.training
    assert not any(parameter.requires_grad for parameter in codec.encoder.parameters())
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ConfigError, match="has not been fitted"):
        codec.encode(masks[:1].float())


@pytest.mark.parametrize(("size", "length"), [(28, 16), (0, 16)])
def test_sizes_that_cannot_be_halved_four_times_are_refused(size, length):
    with pytest.raises(ConfigError, match="multiple of 16"):
        AutoencoderCodec(size, length)


def test_an_autoencoder_file_is_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(autoencoder, "STEPS", 2)
    path = tmp_path / "code.safetensors"
    written = fit_codec("autoencoder", "shapes", path, size=32, length=8, max_masks=20, progress=False)
    codec = AutoencoderCodec(32, 8)
    codec_files.load(codec, path)
    assert torch.equal(codec.last.weight, written.last.weight)
    with pytest.raises(ConfigError, match="must be a multiple of 16 from 32 to 1024, got 30"):
        fit_codec("autoencoder", "shapes", tmp_path / "x.safetensors", size=30)


def test_autoencoder_is_a_mask_codec():
    assert isinstance(AutoencoderCodec(), MaskCodec)


def test_the_reconstruction_of_a_mask_does_not_depend_on_the_other_masks():
    codec = compare._build(compare.CodecSpec("autoencoder", 32, 16))
    codec.fit(torch.cat([crop(targets.masks, targets.boxes, 32) for _, targets in shapes(4)]), steps=20)
    assert not codec.training
    targets = max((targets for _, targets in shapes(8)), key=len)
    together = compare.reconstruct(codec, targets.masks, targets.boxes)
    assert len(targets) > 1
    assert together[:1] == compare.reconstruct(codec, targets.masks[:1], targets.boxes[:1])


@pytest.mark.parametrize(
    ("size", "length", "message"), [(16, 8, "must be a multiple of 16 from 32 to 1024, got 16"), (32, 0, "1 to 1024, got 0")]
)
def test_sizes_and_lengths_that_cannot_work_are_refused(size, length, message):
    with pytest.raises(ConfigError, match=message):
        AutoencoderCodec(size, length)
