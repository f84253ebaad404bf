"""Run lengths in C against their plain versions and pycocotools."""

import pickle

import jaxtyping
import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from maskset import rle
from maskset.instances import Masks


def hostile_masks() -> list[torch.Tensor]:
    """Return masks of sizes and shapes that are easily forgotten."""
    corners = torch.zeros(4, 5, 7, dtype=torch.bool)
    corners[[0, 1, 2, 3], [0, 0, 4, 4], [0, 6, 0, 6]] = True
    stripes = torch.zeros(3, 6, 9, dtype=torch.bool)
    stripes[0, ::2], stripes[1, :, ::2], stripes[2, :, 3:6] = True, True, True
    noise = torch.rand(3, 40, 200, generator=torch.Generator().manual_seed(0)) > 0.5
    sizes = [(0, 0), (0, 3), (3, 0), (1, 1), (1, 70), (70, 1), (64, 64), (9, 65)]
    full = [torch.full((2, *size), value) for size in sizes for value in (False, True)]
    return [corners, stripes, noise, noise[:0], *full]


def random_masks(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    height, width = torch.randint(1, 90, (2,), generator=generator).tolist()
    smooth = torch.nn.functional.interpolate(torch.randn(1, 3, 4, 4, generator=generator), (height, width), mode="bicubic")[0]
    noise = torch.rand(3, height, width, generator=generator) > torch.rand(3, 1, 1, generator=generator)
    return torch.cat([smooth > 0.5, noise])


EVERY = [*hostile_masks(), *(random_masks(seed) for seed in range(20))]


@pytest.mark.parametrize("masks", EVERY, ids=lambda masks: "x".join(map(str, masks.shape)))
def test_everything_about_run_lengths_is_what_the_plain_versions_say(both, masks):
    size = (masks.shape[1], masks.shape[2])
    runs, expected = both(lambda: rle.encode(masks))
    assert [one.tolist() for one in runs] == [one.tolist() for one in expected]
    for work in (
        lambda: rle.decode(runs, size).tolist(),
        lambda: rle.areas(runs).tolist(),
        lambda: rle.boxes(runs, size[0]).tolist() if size[0] else None,
        lambda: rle.to_strings(runs, size),
        lambda: [rle.from_string(text).tolist() for text in rle.to_strings(runs, size)],
    ):
        found, expected = both(work)
        assert found == expected
    assert torch.equal(rle.decode(runs, size), masks)


@pytest.mark.parametrize("masks", [masks for masks in EVERY if masks.numel()], ids=lambda masks: "x".join(map(str, masks.shape)))
def test_texts_are_those_of_pycocotools(masks):
    pixels = np.asfortranarray(masks.permute(1, 2, 0).numpy().astype(np.uint8))
    expected = [one["counts"].decode() for one in coco_mask.encode(pixels)]
    assert rle.to_strings(rle.encode(masks), (masks.shape[1], masks.shape[2])) == expected


TEXTS = ["", "0", "04", "i4T=N2", "oooooo3", "ooooooo3", "Poooooo", "00P", "~0", "0\xff", "PPPPPP2", "PPPPPP1"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_read_or_refused_as_the_plain_version_does_it(both, text):
    def read():
        try:
            return rle.from_string(text).tolist()
        except rle.MaskError as error:
            return str(error).removesuffix(".")

    found, expected = both(read)
    assert found == expected or ("32 bits" in found and "32 bits" in expected)


@pytest.mark.parametrize("seed", range(30))
def test_a_view_shows_what_its_plain_version_shows(both, seed):
    masks, generator = Masks.from_dense(random_masks(seed)), torch.Generator().manual_seed(seed)

    def draw(first: int, end: int) -> int:
        return int(torch.randint(first, end, (1,), generator=generator))

    for _ in range(4):
        height, width = masks.size
        left, top = draw(0, width), draw(0, height)
        changed = (
            masks.flipped(),
            masks.scaled((draw(1, 90), draw(1, 90))),
            masks.cropped((left, top, draw(left, width) + 1, draw(top, height) + 1)),
        )
        masks = changed[draw(0, 3)]
    dense, expected = both(masks.dense)
    assert torch.equal(dense, expected)
    runs, expected = both(masks.rle)
    assert [one.tolist() for one in runs] == [one.tolist() for one in expected]


@pytest.mark.usefixtures("both")  # skips without the library
def test_run_lengths_that_sum_to_nothing_that_fits_are_drawn_as_far_as_they_go():
    wrong = [2, 3], [2, -5, 1, 100], [], [0, 0, 0, 0, 3, 2, 2**31 - 1, 2**31 - 1]
    counts = [torch.tensor(one, dtype=torch.int32) for one in wrong]
    drawn = rle.runs.dense(rle.runs.view(counts, (3, 4)))
    assert drawn.transpose(1, 2).flatten(1).int().tolist() == [
        [0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [0] * 12,
        [0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0],
    ]


def test_an_image_with_more_pixels_than_run_lengths_count_is_refused():
    masks = Masks([torch.tensor([4], dtype=torch.int32)], (2, 2)).scaled((2**16, 2**15))
    with pytest.raises(rle.MaskError, match="too large for run lengths"):
        masks.rle()


@pytest.mark.parametrize("seed", range(20))
def test_polygons_are_drawn_as_pycocotools_draws_them(both, seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 60, 2).tolist()
    masks = [tuple(polygon(rng, width, height) for _ in range(rng.integers(1, 4))) for _ in range(150)]
    found, expected = both(lambda: rle.rasterize(masks, (height, width)))
    wrong = [one for one, a, b in zip(masks, found, expected, strict=True) if a.tolist() != b.tolist()]
    assert not wrong


def polygon(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Return corners around an image: any, whole, halves, fine, tiny; with some repeated, on one line, or on the border."""
    points = rng.uniform(-10, 70, (rng.integers(3, 10), 2))
    points = [points, points.round(), (2 * points).round() / 2, points.round(1), points * 0.02][rng.integers(0, 5)]
    if rng.random() < 0.2:
        points[1] = points[0]
    if rng.random() < 0.2:
        points[:, rng.integers(0, 2)] = points[0, 0]
    return np.clip(points, 0, [width, height]) if rng.random() < 0.3 else points


def test_corners_as_far_out_as_is_allowed_cost_nothing(both):
    far = 2 * 480 + 100
    outline = np.array([[-far, -far], [far, 200.5], [-far, far], [300, -far], [far, far]], dtype=np.float64)
    found, expected = both(lambda: rle.rasterize([(outline,), (outline, 0.9 * outline[::-1] + 3)], (480, 480)))
    assert [one.tolist() for one in found] == [one.tolist() for one in expected]
    farther, size = torch.from_numpy(1e6 * outline), (480, 480)  # nobody may ask for it, and yet it costs nothing
    assert rle.runs.rasterize(farther, [5], [1], size)[0].sum() == 480 * 480


def test_how_many_threads_work_changes_nothing():
    masks, threads = torch.cat([masks for masks in [random_masks(3)] * 20]), torch.get_num_threads()
    view, expected = Masks.from_dense(masks).flipped(), rle.encode(masks.flip(2))
    try:
        torch.set_num_threads(5)
        assert [one.tolist() for one in view.rle()] == [one.tolist() for one in expected]
        assert torch.equal(view.dense(), masks.flip(2))
    finally:
        torch.set_num_threads(threads)


def test_one_of_many_masks_does_not_hold_or_pickle_the_others():
    masks = Masks.from_dense(torch.cat([random_masks(3)] * 20))
    assert len(pickle.dumps(masks[0])) < len(pickle.dumps(masks)) / 20
    for made in (masks, masks.flipped(), Masks.from_polygons([masks[0].polygons()[0]] * 3, masks.size)):
        assert all(counts.untyped_storage().nbytes() == counts.nbytes for counts in made.rle())


def test_whole_numbers_of_any_length_are_understood(both, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # who does not check types gives what he has
    dense = random_masks(5)
    size, runs = (dense.shape[1], dense.shape[2]), [counts.long() for counts in rle.encode(dense)]
    rows, columns = (torch.arange(side, dtype=torch.int32) for side in size)
    for found in (
        *both(lambda: rle.decode(rle.encode(dense.long()), size)),
        *both(lambda: Masks.from_rle(runs, size).dense()),
        *both(lambda: Masks(runs, size, rows, columns.flip(0)).flipped().dense()),
    ):
        assert torch.equal(found, dense)
    assert Masks.from_rle(runs, size).areas().tolist() == dense.flatten(1).sum(1).tolist()
