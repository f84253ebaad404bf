import numpy as np
import pytest
import torch
from goldens import ellipses

from maskset.masks.codecs import pca
from maskset.masks.codecs.pca import PcaCodec
from maskset.masks.paint import binarize


@pytest.fixture(scope="module")
def masks() -> torch.Tensor:
    return ellipses("pca", 12, 12, 300)


@pytest.fixture(scope="module")
def fitted(masks) -> PcaCodec:
    codec = PcaCodec(12, 20)
    codec.fit(masks)
    return codec


def test_the_basis_is_that_of_numpys_singular_value_decomposition(masks, fitted):
    right = np.linalg.svd(masks.flatten(1).double().numpy(), full_matrices=False)[2][:20].T
    basis = fitted.basis.double().numpy()
    np.testing.assert_allclose(np.abs((basis * right).sum(0)), 1, atol=1e-5)


def test_the_projection_is_orthonormal_as_equation_4_wants(fitted):
    torch.testing.assert_close(fitted.basis.T @ fitted.basis, torch.eye(20), atol=1e-5, rtol=0)


def test_a_code_is_the_mask_times_the_basis_and_back_times_its_transpose(masks, fitted):
    codes = fitted.encode(masks.float())
    torch.testing.assert_close(codes, masks.flatten(1).float() @ fitted.basis)
    torch.testing.assert_close(fitted.decode(codes), (codes @ fitted.basis.T).view(-1, 12, 12))


def test_all_components_reconstruct_masks_exactly(masks):
    codec = PcaCodec(12, 144)
    codec.fit(masks)
    assert torch.equal(binarize(codec.decode(codec.encode(masks.float()))), masks)


def test_how_masks_are_batched_does_not_matter(masks, fitted):
    batched = PcaCodec(12, 20)
    batched.fit(part for part in masks.split([0, 1, 130, 100, 69]))
    assert torch.equal(batched.basis, fitted.basis)


def test_signs_are_not_left_to_the_solver(fitted):
    largest = fitted.basis.gather(0, fitted.basis.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


def test_masks_too_large_for_the_whole_matrix_are_coded_nearly_as_well(masks, fitted, monkeypatch):
    monkeypatch.setattr(pca, "EXACT_UP_TO", 0)
    monkeypatch.setattr(pca, "BATCH", 32)
    sketched = PcaCodec(12, 20)
    sketched.fit(masks)
    torch.testing.assert_close(sketched.basis.T @ sketched.basis, torch.eye(20), atol=1e-4, rtol=0)
    errors = [(codec.decode(codec.encode(masks.float())) - masks.float()).square().mean() for codec in (fitted, sketched)]
    assert errors[1] < 1.03 * errors[0]


def test_saved_weights_hold_the_fit(masks, fitted):
    loaded = PcaCodec(12, 20)
    loaded.load_state_dict(fitted.state_dict())
    assert torch.equal(loaded.encode(masks.float()), fitted.encode(masks.float()))
