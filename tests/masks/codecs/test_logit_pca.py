import numpy as np
import pytest
import torch
from goldens import ellipses

from maskset.codec_tools.fit import fit_codec
from maskset.errors import ConfigError
from maskset.masks.codecs import files as codec_files
from maskset.masks.codecs import logit_pca, pca
from maskset.masks.codecs.logit_pca import LogitPcaCodec


@pytest.fixture(scope="module")
def masks() -> torch.Tensor:
    return ellipses("logit-pca", 12, 12, 300)


@pytest.fixture(scope="module")
def fitted(masks) -> LogitPcaCodec:
    codec = LogitPcaCodec(12, 20)
    codec.fit(masks)
    return codec


def logits(masks: torch.Tensor, seed: int = 0) -> np.ndarray:
    """Return what a fit draws for masks, pixel after pixel."""
    drawn = torch.rand(len(masks), 144, generator=torch.Generator().manual_seed(seed))
    softness = (0.05 * drawn).clamp(min=0.01)
    return torch.where(masks.flatten(1), 1 - softness, softness).logit().double().numpy()


def test_the_components_are_those_of_numpys_singular_value_decomposition(masks, fitted):
    values = logits(masks)
    mean = values.mean(0)
    _, scale, right = np.linalg.svd(values - mean, full_matrices=False)
    np.testing.assert_allclose(fitted.means, mean, atol=1e-5)
    np.testing.assert_allclose(fitted.explained_variances, scale[:20] ** 2 / 299, rtol=1e-4)
    np.testing.assert_allclose(np.abs((fitted.components.numpy() * right[:20]).sum(1)), 1, atol=1e-4)
    assert (fitted.components.gather(1, fitted.components.abs().argmax(1, keepdim=True)) > 0).all()


def test_codes_of_the_masks_of_the_fit_are_white(masks, fitted):
    torch.manual_seed(0)
    codes = fitted.encode(masks.float(), noisy=True)
    assert codes.mean(0).abs().max() < 0.1
    assert (codes.var(0) - 1).abs().max() < 0.2


def test_all_components_reconstruct_masks_exactly(masks):
    codec = LogitPcaCodec(12, 144)
    codec.fit(masks)
    decoded = codec.decode(codec.encode(masks.float()))
    torch.testing.assert_close(decoded, torch.where(masks, 0.975, 0.025), atol=1e-3, rtol=0)


def test_few_components_keep_most(masks, fitted):
    decoded = fitted.decode(fitted.encode(masks.float())) >= 0.5
    assert (decoded & masks).sum() / (decoded | masks).sum() > 0.9


def test_noise_comes_from_torchs_generator_and_only_with_noisy(masks, fitted):
    some = masks[:5].float()
    assert torch.equal(fitted.encode(some), fitted.encode(some))
    torch.manual_seed(3)
    first, second = fitted.encode(some, noisy=True), fitted.encode(some, noisy=True)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(first, fitted.encode(some, noisy=True))


def test_a_pixel_becomes_the_logit_of_one_or_nought_less_the_softness():
    values = logit_pca._logits(torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0]), torch.tensor([0.5, 0.5, 0.0, 0.1, 1.0]))
    torch.testing.assert_close(values.sigmoid(), torch.tensor([0.975, 0.025, 0.99, 0.01, 0.95]))


def test_how_masks_are_batched_and_how_often_does_not_matter(masks, fitted):
    batched = LogitPcaCodec(12, 20)
    torch.manual_seed(9)  # not what a fit draws from
    batched.fit(part for part in masks.split([0, 1, 130, 100, 69]))
    assert torch.equal(batched.components, fitted.components)
    batched.fit(masks)
    assert torch.equal(batched.explained_variances, fitted.explained_variances)


def test_masks_too_large_for_the_whole_matrix_are_coded_nearly_as_well(masks, fitted, monkeypatch):
    monkeypatch.setattr(pca, "EXACT_UP_TO", 0)
    monkeypatch.setattr(pca, "BATCH", 32)
    sketched = LogitPcaCodec(12, 20)
    sketched.fit(masks)
    torch.testing.assert_close(sketched.means, fitted.means, atol=0.05, rtol=0)  # other batches draw other noise
    torch.testing.assert_close(sketched.components @ sketched.components.T, torch.eye(20), atol=1e-4, rtol=0)
    torch.testing.assert_close(sketched.explained_variances[:10], fitted.explained_variances[:10], rtol=0.05, atol=0)
    errors = [(codec.decode(codec.encode(masks.float())) - masks.float()).square().mean() for codec in (fitted, sketched)]
    assert errors[1] < 1.05 * errors[0]


def test_one_mask_more_than_components_is_needed_since_the_mean_takes_one():
    masks = torch.rand(20, 12, 12, generator=torch.Generator().manual_seed(0)) > 0.5
    with pytest.raises(ConfigError, match="20 numbers cannot be fitted to 20 masks: it needs at least 21"):
        LogitPcaCodec(12, 20).fit(masks)


def test_masks_that_never_vary_give_a_code_that_is_finite():
    codec = LogitPcaCodec(12, 20)
    codec.fit(torch.ones(21, 12, 12, dtype=torch.bool))
    assert codec.decode(codec.encode(torch.ones(1, 12, 12))).isfinite().all()


def test_gradients_pass_through_the_decoder_and_stay_out_of_the_code(fitted):
    codes = torch.zeros(2, 20, requires_grad=True)
    fitted.decode(codes).sum().backward()
    assert codes.grad.any()
    assert not list(fitted.parameters())


def test_a_file_is_read_back_and_refused_for_another_length(tmp_path):
    written = fit_codec("logit-pca", "shapes", tmp_path / "code.safetensors", size=14, max_masks=80, length=12, progress=False)
    codec = LogitPcaCodec(14, 12)
    codec_files.load(codec, tmp_path / "code.safetensors")
    assert torch.equal(codec.components, written.components)
    with pytest.raises(ConfigError, match="holds another mask codec: length 12 instead of 11"):
        codec_files.load(LogitPcaCodec(14, 11), tmp_path / "code.safetensors")
