import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from maskset import rle
from maskset.instances.masks import nearest_index


def random_masks(seed: int):
    generator = torch.Generator().manual_seed(seed)
    height, width = torch.randint(1, 40, (2,), generator=generator).tolist()
    return torch.rand(6, height, width, generator=generator) > torch.rand(6, 1, 1, generator=generator)


@pytest.mark.parametrize("seed", range(20))
def test_run_lengths_are_those_of_pycocotools(seed):
    masks = random_masks(seed)
    size = (masks.shape[1], masks.shape[2])
    counts = rle.encode(masks)
    assert torch.equal(rle.decode(counts, size), masks)
    assert torch.equal(rle.areas(counts), masks.sum((1, 2)))
    for mask, runs in zip(masks, counts, strict=True):
        reference = coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
        assert rle.to_strings([runs], size)[0] == reference["counts"].decode()
        assert torch.equal(rle.from_string(reference["counts"]), runs)
        assert rle.area(runs) == coco_mask.area(reference)
        x, y, w, h = coco_mask.toBbox(reference)
        assert rle.box(runs, size[0]) == ((x, y, x + w, y + h) if rle.area(runs) else (0, 0, 0, 0))


def test_full_empty_and_no_masks_survive():
    masks = torch.stack([torch.zeros(3, 4, dtype=torch.bool), torch.ones(3, 4, dtype=torch.bool)])
    assert [c.tolist() for c in rle.encode(masks)] == [[12], [0, 12]]
    assert torch.equal(rle.decode(rle.encode(masks), (3, 4)), masks)
    assert rle.decode([], (3, 4)).shape == (0, 3, 4)
    assert rle.areas(rle.encode(masks)).tolist() == [0, 12]
    assert rle.areas([]).tolist() == []


def test_long_runs_survive_the_text():
    counts = torch.tensor([1_000_000, 1, 2_000_000, 123_456, 7], dtype=torch.int32)
    size = (1, int(counts.sum()))
    assert torch.equal(rle.from_string(rle.to_strings([counts], size)[0]), counts)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"counts": [5, 5], "size": [3, 4]}, "sum to 10"),
        ({"counts": [-1, 13], "size": [3, 4]}, "negative"),
        ({"counts": [1.5, 10.5], "size": [3, 4]}, "whole number"),
        ({"counts": [12], "size": [4, 4]}, "size"),
        ({"counts": "~~~", "size": [3, 4]}, "characters"),
        ({"counts": "00P", "size": [3, 4]}, "ends inside"),
        ({"counts": "oooooooooooo0", "size": [3, 4]}, "32 bits"),
        ({"size": [3, 4]}, "counts"),
        ([[0, 0, 2, 2]], "three"),
        ([[0, 0, 2, 2, 1]], "flat list"),
        ([[0, 0, 1e9, 2, 1, 1]], "far outside"),
        ([[0, 0, float("nan"), 2, 1, 1]], "finite"),
        ([[0, 0, "a", 2, 1, 1]], "numbers"),
        ([], "empty"),
        (7, "got int"),
    ],
)
def test_a_mask_that_would_harm_pycocotools_is_refused(segmentation, message):
    with pytest.raises(rle.MaskError, match=message):
        rle.from_coco(segmentation, (3, 4))


def test_polygons_are_rasterized_as_pycocotools_does():
    polygons = (np.array([[1.5, 1], [8, 2], [5, 7.5]]), np.array([[10.0, 10], [14, 10], [14, 13]]))
    counts = rle.from_polygons(polygons, (16, 20))
    merged = coco_mask.merge(coco_mask.frPyObjects([p.reshape(-1).tolist() for p in polygons], 16, 20))
    assert np.array_equal(rle.decode([counts], (16, 20))[0].numpy(), coco_mask.decode(merged).astype(bool))


@pytest.mark.parametrize("seed", range(10))
def test_outlines_give_a_mask_without_holes_back(seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(30, 40, dtype=torch.bool)
    for _ in range(5):
        y, x = torch.randint(0, 25, (2,), generator=generator).tolist()
        h, w = torch.randint(1, 9, (2,), generator=generator).tolist()
        mask[y : y + h, x : x + w] = True
    counts = rle.encode(mask[None])[0]
    outlines = rle.outlines(counts, (30, 40))
    rebuilt = rle.decode([rle.from_polygons(tuple(outlines), (30, 40))], (30, 40))[0]
    assert rebuilt[mask].all()
    holes = rebuilt & ~mask
    from scipy.ndimage import binary_fill_holes

    assert torch.equal(rebuilt, torch.from_numpy(binary_fill_holes(mask.numpy()))), holes.sum()


def test_the_nearest_index_is_torchs():
    source = torch.arange(37, dtype=torch.float32)
    for new in (1, 5, 36, 37, 38, 100):
        expected = torch.nn.functional.interpolate(source[None, None], size=new, mode="nearest")[0, 0]
        assert torch.equal(source[nearest_index(37, new)], expected)


@pytest.mark.parametrize(("first", "end"), [(0, 9), (3, 4), (2, 7), (0, 0), (9, 9)])
def test_some_columns_are_those_of_the_whole(first, end):
    masks = torch.rand(5, 7, 9, generator=torch.Generator().manual_seed(0)) > 0.5
    decoded = rle.decode(rle.encode(masks), (7, 9), columns=torch.arange(first, end))
    assert torch.equal(decoded, masks[:, :, first:end])
