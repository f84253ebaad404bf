import copy
import inspect
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree

from maskset.errors import ConfigError, MaskError, MasksetError
from maskset.instances import Category, Instances, Masks
from maskset.instances.masks import positions
from maskset.structures import ImageBatch, ModelOutput, SlotPredictions
from maskset.systems.base import InputConfig

CATEGORIES = (Category("cat", 17), Category("dog", 18))


def dense(count=4, height=11, width=17, seed=0):
    return torch.rand(count, height, width, generator=torch.Generator().manual_seed(seed)) > 0.6


def some_instances():
    masks = Masks.from_dense(dense())
    return Instances(torch.tensor([0, 1, 1, 0]), masks.boxes(), masks, torch.tensor([0.9, 0.2, 0.6, 0.4]), CATEGORIES)


def test_any_chain_of_flip_crop_and_scale_shows_the_pixels_that_dense_masks_would():
    masks = dense()
    view = Masks.from_dense(masks).flipped().scaled((23, 9)).cropped((1, 3, 8, 20)).scaled((40, 41)).flipped()
    expected = F.interpolate(masks.flip(2)[None].float(), size=(23, 9), mode="nearest")[:, :, 3:20, 1:8]
    expected = F.interpolate(expected, size=(40, 41), mode="nearest")[0].flip(2) > 0
    assert view.size == (40, 41)
    assert torch.equal(view.dense(), expected)
    assert view == Masks.from_dense(expected)
    assert torch.equal(view.areas(), expected.sum((1, 2)))
    assert torch.equal(view.boxes(), Masks.from_dense(expected).boxes())


def test_masks_are_equal_however_their_run_lengths_are_cut():
    cut = Masks.from_rle([[2, 1, 0, 3, 4, 0, 2, 0]], (3, 4))
    whole = Masks.from_rle([[2, 4, 6]], (3, 4))
    assert cut == whole
    assert whole == cut
    assert cut != Masks.from_rle([[2, 5, 5]], (3, 4))
    assert cut != Masks.from_rle([[2, 4, 6]], (4, 3))


def test_masks_keep_polygons_as_they_came():
    polygons = [
        [np.array([[1.0, 1], [6, 1.5], [3, 7]])],
        [np.array([[2.0, 2], [9, 2], [9, 9]]), np.array([[0.0, 0], [1, 0], [1, 1]])],
    ]
    masks = Masks.from_polygons(polygons, (12, 12))
    for result, expected in zip(masks.polygons(), polygons, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(result, expected, strict=True))
    assert masks == Masks.from_dense(masks.dense())


def test_masks_are_indexed_like_arrays():
    masks = Masks.from_dense(dense())
    whole = masks.dense()
    assert torch.equal(masks[1:3].dense(), whole[1:3])
    assert torch.equal(masks[torch.tensor([3, 0])].dense(), whole[[3, 0]])
    assert torch.equal(masks[torch.tensor([True, False, False, True])].dense(), whole[[0, 3]])
    assert torch.equal(masks[-1].dense(), whole[-1:])
    with pytest.raises(IndexError):
        masks[4]
    with pytest.raises(IndexError, match="boolean"):
        masks[torch.tensor([True, False])]
    assert len(masks[[]]) == 0


@pytest.mark.parametrize(
    "index", [torch.tensor([0.9, 0.2]), [0.5, 1.5], np.array([[0, 1], [1, 0]]), torch.ones(4, 1, dtype=torch.bool)]
)
def test_an_index_that_is_not_a_list_of_whole_numbers_or_booleans_is_refused(index):
    with pytest.raises(IndexError, match="index"):
        inspect.unwrap(positions)(index, 4)  # without the type checker of the tests


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("0", "an index must be whole numbers, booleans or a slice, got '0'"),
        ([None], r"got \[None\]"),
        ([10**30], r"got \[1000"),
        ([5], "index 5 is out of range: there are 4 objects, numbered from 0"),
        (-5, "index -5 is out of range"),
    ],
)
def test_an_index_that_selects_nothing_is_named(index, message):
    with pytest.raises(IndexError, match=message):
        inspect.unwrap(Instances.__getitem__)(some_instances(), index)


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_does_not_exist_is_named_with_those_that_do(device):
    for thing in (some_instances(), some_instances().masks, ImageBatch(torch.zeros(1, 3, 4, 5), torch.tensor([[4, 5]]))):
        with pytest.raises(ConfigError, match=f"device '{device}' cannot be used .*Available here: cpu"):
            thing.to(device)


@pytest.mark.parametrize("box", [(-2, 0, 4, 4), (0, 0, 18, 4), (5, 0, 4, 4), (0, 0, 4, 12)])
def test_a_crop_outside_of_the_image_is_refused(box):
    with pytest.raises(MaskError, match="must lie inside the image, 17 x 11 pixels"):
        Masks.from_dense(dense()).cropped(box)


def test_a_batch_of_no_images_is_refused():
    with pytest.raises(MasksetError, match="at least one image"):
        ImageBatch.from_images([])


def test_masks_of_nothing_work():
    masks = Masks([], (5, 6))
    assert masks.dense().shape == (0, 5, 6)
    assert masks.boxes().shape == (0, 4)
    assert len(masks.flipped().to("cpu")) == 0
    assert masks == Masks.from_dense(torch.zeros(0, 5, 6, dtype=torch.bool))
    assert masks != Masks([], (6, 5))


def test_masks_join():
    a, b = Masks.from_dense(dense(2)), Masks.from_dense(dense(3, seed=1)).flipped()
    assert torch.equal(Masks.cat([a, b]).dense(), torch.cat([a.dense(), b.dense()]))


def test_instances_are_selected_as_a_whole():
    instances = some_instances()
    good = instances[instances.scores > 0.5]
    assert good.labels.tolist() == [0, 1]
    assert good.scores.tolist() == pytest.approx([0.9, 0.6])
    assert good.masks == instances.masks[[0, 2]]
    assert len(instances[0]) == 1
    assert [len(instance) for instance in instances] == [1, 1, 1, 1]
    assert repr(good) == "Instances(2 in 11 x 17 pixels: 1 cat, 1 dog)"


def test_instances_of_unequal_lengths_are_refused():
    masks = Masks.from_dense(dense())
    with pytest.raises((ValueError, TypeError), match=r"equally many|Type-check"):
        Instances(torch.tensor([0, 1]), masks.boxes(), masks)


def test_coco_rows_hold_what_pycocotools_reads():
    from pycocotools import mask as coco_mask

    instances = some_instances()
    rows = instances.to_coco(image_id=7)
    assert [row["category_id"] for row in rows] == [17, 18, 18, 17]
    assert {row["image_id"] for row in rows} == {7}
    for row, mask, box in zip(rows, instances.masks.dense(), instances.boxes.tolist(), strict=True):
        assert np.array_equal(coco_mask.decode(row["segmentation"]), mask.numpy())
        assert row["bbox"] == [box[0], box[1], box[2] - box[0], box[3] - box[1]]
    assert rows[0]["score"] == pytest.approx(0.9)


def test_supervision_reads_the_same_objects():
    supervision = pytest.importorskip("supervision")
    instances = some_instances()
    detections = instances.to_supervision()
    assert isinstance(detections, supervision.Detections)
    assert np.array_equal(detections.mask, instances.masks.dense().numpy())
    assert detections.data["class_name"].tolist() == instances.names


def test_padding_is_zero_after_normalizing_and_known_at_every_scale():
    images = [torch.full((3, 10, 7), 255, dtype=torch.uint8), torch.full((3, 5, 12), 255, dtype=torch.uint8)]
    batch = ImageBatch.from_images(images, divisor=4)
    assert batch.pixels.shape == (2, 3, 12, 12)
    normalized = batch.normalized(InputConfig())
    white = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(normalized.pixels[0, :, :10, :7], white.view(3, 1, 1).expand(3, 10, 7))
    assert normalized.pixels[0, :, 10:].abs().sum() == 0
    assert normalized.pixels[1, :, :, 5:].shape == (3, 12, 7)
    full = torch.ones(2, 12, 12)
    full[0, :10, :7] = 0
    full[1, :5, :12] = 0
    for size in ((12, 12), (6, 6), (5, 7), (1, 1)):
        expected = F.interpolate(full[:, None], size=size, mode="nearest")[:, 0] > 0
        assert torch.equal(batch.padding(size), expected)
    with pytest.raises(ValueError, match="normalized before"):
        normalized.normalized(InputConfig())


def test_bgr_models_get_blue_first():
    image = torch.zeros(3, 2, 2, dtype=torch.uint8)
    image[0] = 255
    config = InputConfig(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), channel_order="bgr")
    assert ImageBatch.from_images([image]).normalized(config).pixels[0, :, 0, 0].tolist() == [0, 0, 1]


def things():
    predictions = SlotPredictions(torch.rand(1, 2, 3), torch.rand(1, 2, 4), torch.rand(1, 2, 4))
    return [
        ImageBatch.from_images([torch.zeros(3, 4, 5, dtype=torch.uint8)]),
        Masks.from_dense(dense()).flipped(),
        some_instances(),
        ModelOutput([predictions], None, predictions),
    ]


@pytest.mark.parametrize("thing", things(), ids=lambda thing: type(thing).__name__)
def test_everything_that_holds_tensors_moves_as_a_whole(thing):
    moved = thing.to("meta") if not isinstance(thing, (Masks, Instances)) else thing.to("cpu")
    leaves, spec = pytree.tree_flatten(moved)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    assert tensors
    assert len({tensor.device for tensor in tensors}) == 1
    rebuilt = pytree.tree_unflatten(leaves, spec)
    assert type(rebuilt) is type(thing)
    for again in (pickle.loads(pickle.dumps(thing)), copy.deepcopy(thing)):
        old, new = pytree.tree_leaves(thing), pytree.tree_leaves(again)
        assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True) if isinstance(a, torch.Tensor))


def test_masks_on_a_device_are_run_lengths():
    polygons = Masks.from_polygons([[np.array([[1.0, 1], [6, 1.5], [3, 7]])]], (12, 12)).flipped()
    moved = polygons.to("meta")
    assert moved.device.type == "meta"
    assert moved.size == (12, 12)
