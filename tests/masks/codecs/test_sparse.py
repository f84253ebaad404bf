import pytest
import torch
from goldens import ellipses

from maskset.errors import ConfigError
from maskset.masks.codecs import MaskCodec, sparse
from maskset.masks.codecs.sparse import SparseCodec
from maskset.masks.paint import binarize


@pytest.fixture(scope="module", autouse=True)
def short_learning():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "LEARNING_STEPS", 20)
        patch.setattr(sparse, "LEARNING_BATCH", 128)
        yield


@pytest.fixture(scope="module")
def masks() -> torch.Tensor:
    return ellipses("sparse", 12, 12, 300)


@pytest.fixture(scope="module")
def fitted(masks, short_learning) -> SparseCodec:
    codec = SparseCodec(12, 40)
    codec.fit(masks)
    return codec


def objective(codec: SparseCodec, masks: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Equation 3 of each mask."""
    errors = masks.flatten(1).double() - codes.double() @ codec.atoms.double()
    return errors.square().sum(1) / 2 + float(codec.beta) * codes.double().abs().sum(1)


def test_atoms_have_unit_norm(fitted):
    torch.testing.assert_close(fitted.atoms.norm(dim=1), torch.ones(40))


def test_codes_fulfil_the_conditions_of_a_least_objective(masks, fitted):
    codes = fitted.encode(masks.float())
    gradient = (codes @ fitted.atoms - masks.flatten(1).float()) @ fitted.atoms.T
    beta = float(fitted.beta)
    used = codes != 0
    assert (gradient[used] + beta * codes[used].sign()).abs().max() < 0.05 * beta
    assert gradient[~used].abs().max() < 1.05 * beta


def test_no_small_change_of_a_code_is_better(masks, fitted):
    codes = fitted.encode(masks.float())
    least = objective(fitted, masks, codes)
    generator = torch.Generator().manual_seed(0)
    for scale in (0.01, 0.1, 1.0):
        changed = codes + scale * torch.randn(codes.shape, generator=generator)
        assert (objective(fitted, masks, changed) > least).all()


def test_decoding_is_linear(masks, fitted):
    codes = fitted.encode(masks.float())
    torch.testing.assert_close(fitted.decode(codes), (codes @ fitted.atoms).view(-1, 12, 12))


def test_most_numbers_are_zero_and_most_of_the_mask_comes_back(masks, fitted):
    codes = fitted.encode(masks.float())
    assert (codes != 0).float().mean() < 0.5
    result = binarize(fitted.decode(codes))
    assert ((result & masks).sum((1, 2)) / (result | masks).sum((1, 2))).mean() > 0.9


def test_a_larger_beta_makes_sparser_codes(masks, fitted):
    greedy = SparseCodec(12, 40, beta=2.0)
    greedy.fit(masks)
    assert (greedy.encode(masks.float()) != 0).sum() < 0.7 * (fitted.encode(masks.float()) != 0).sum()


def test_learning_improves_on_atoms_that_are_masks(masks, fitted, monkeypatch):
    monkeypatch.setattr(sparse, "LEARNING_STEPS", 0)
    start = SparseCodec(12, 40)
    start.fit(masks)
    before = objective(start, masks, start.encode(masks.float())).mean()
    assert objective(fitted, masks, fitted.encode(masks.float())).mean() < 0.9 * before


def test_the_same_masks_and_seed_give_the_same_dictionary_however_they_are_batched(masks, fitted):
    again, other = SparseCodec(12, 40), SparseCodec(12, 40)
    again.fit(iter(masks.split(7)))
    other.fit(masks, seed=1)
    assert torch.equal(again.atoms, fitted.atoms)
    assert not torch.equal(other.atoms, fitted.atoms)


def test_an_atom_that_no_mask_uses_is_replaced_by_what_masks_lack():
    atoms = torch.eye(2, 4)
    errors = torch.tensor([[0.0, 0, 0, 0], [0.0, 0, 3, 4]])
    sparse._improve(atoms, torch.tensor([[2.0, 0], [0, 0]]), torch.tensor([[0.0, 0, 2, 0], [0, 0, 0, 0]]), errors)
    torch.testing.assert_close(atoms, torch.tensor([[0.0, 0, 1, 0], [0.0, 0, 0.6, 0.8]]))


def test_masks_that_are_all_equal_still_give_finite_codes():
    codec, masks = SparseCodec(6, 8), torch.ones(8, 6, 6, dtype=torch.bool)
    codec.fit(masks)
    assert codec.encode(masks.float()).isfinite().all()
    torch.testing.assert_close(codec.decode(codec.encode(masks.float())).mean(), torch.tensor(1.0), atol=0.1, rtol=0)


def test_beta_grows_with_the_side_of_the_mask():
    assert float(SparseCodec(28, 4).beta) == pytest.approx(0.3)
    assert float(SparseCodec(56, 4).beta) == pytest.approx(0.6)


def test_a_code_that_was_not_fitted_says_so():
    with pytest.raises(ConfigError, match=r"SparseCodec\(12, 40\) has not been fitted"):
        SparseCodec(12, 40).encode(torch.zeros(1, 12, 12))
    with pytest.raises(ConfigError, match="has not been fitted"):
        SparseCodec(12, 40).decode(torch.zeros(1, 40))


def test_saved_weights_hold_the_fit_and_its_beta(masks):
    codec, loaded = SparseCodec(12, 40, beta=1.0), SparseCodec(12, 40)
    codec.fit(masks)
    loaded.load_state_dict(codec.state_dict())
    assert float(loaded.beta) == 1.0
    assert torch.equal(loaded.encode(masks.float()), codec.encode(masks.float()))


def test_fewer_masks_than_atoms_are_refused(masks):
    codec = SparseCodec(12, 40)
    with pytest.raises(ConfigError, match="40 numbers cannot be fitted to 39 masks"):
        codec.fit(masks[:39])
    with pytest.raises(ConfigError, match="to 0 masks"):
        codec.fit([])
    assert not codec.fitted


@pytest.mark.parametrize("settings", [(0, 4, None), (4, 0, None), (4, 4, 0.0), (4, 4, -1.0)])
def test_settings_that_are_not_positive_are_refused(settings):
    with pytest.raises(ConfigError, match="positive size, length and beta"):
        SparseCodec(*settings)


def test_sparse_is_a_mask_codec():
    assert isinstance(SparseCodec(), MaskCodec)
