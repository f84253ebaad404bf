"""Drawings show every object, in colors that can be told apart, and hide as little as possible."""

import itertools

import numpy as np
import pytest
import torch
from fakes import discs, make_instances
from PIL import Image

from maskset.instances import Category, Instances
from maskset.instances.drawing import PALETTE, label_places

ONE, THREE = (Category("cell", 1),), (Category("cell", 1), Category("dust", 2), Category("hair", 3))
MANY = tuple(Category(f"class {i}", i) for i in range(80))
GRAY = np.full((200, 300, 3), 128, np.uint8)


def disc(x: float, y: float, radius: float, label: int = 0, categories=ONE, score: float | None = None) -> Instances:
    return make_instances([label], discs([(x, y, radius)], (200, 300)), None if score is None else [score], categories)


def side_by_side(labels: list[int], categories: tuple[Category, ...]) -> tuple[Instances, list[tuple[int, int]]]:
    """Return discs that touch, and their centers."""
    centers = [(30 + 40 * i, 100) for i in range(len(labels))]
    return make_instances(labels, discs([(x, y, 20) for x, y in centers], (200, 300)), None, categories), centers


def fills(labels: list[int], categories: tuple[Category, ...]) -> list[tuple[int, ...]]:
    instances, centers = side_by_side(labels, categories)
    pixels = np.array(instances.draw(GRAY, scale=1))
    return [tuple(pixels[y, x].tolist()) for x, y in centers]


def test_a_mask_is_filled_and_has_a_line_around_it_and_the_rest_is_left_alone():
    pixels = np.array(disc(150, 100, 40).draw(GRAY, scale=1)).astype(int)
    assert pixels.shape == (200, 300, 3)
    assert np.allclose(pixels[100, 150], 0.6 * 128 + 0.4 * np.array(PALETTE[0]), atol=1)
    assert tuple(pixels[100, 190 - 1]) == PALETTE[0]
    assert (pixels[100, 190] < 128).all()  # a dark rim, to be seen on any ground
    untouched = np.ones((200, 300), bool)
    untouched[58:142, 108:192] = False
    assert (pixels[untouched] == 128).all()


def test_small_images_are_enlarged_by_a_whole_factor_unless_a_scale_is_given():
    small = make_instances([0], discs([(50, 40, 20)], (80, 100)), None, ONE)
    assert small.draw(np.zeros((80, 100, 3), np.uint8)).size == (800, 640)
    assert small.draw(np.zeros((80, 100, 3), np.uint8), scale=2).size == (200, 160)
    assert disc(9, 9, 5).draw(GRAY).size == (600, 400)
    assert Instances.empty((900, 100)).draw(np.zeros((900, 100, 3), np.uint8)).size == (100, 900)


def test_an_enlarged_mask_lies_where_it_was():
    pixels = np.array(disc(150, 100, 40).draw(GRAY, scale=4))
    changed = (pixels != 128).any(2)
    columns = np.flatnonzero(changed[400])
    assert abs(columns[0] - 440) <= 4
    assert abs(columns[-1] - 760) <= 4


@pytest.mark.parametrize(("labels", "categories"), [([0] * 6, ONE), ([0, 0, 0], THREE), ([7, 0, 14, 7], MANY)])
def test_objects_side_by_side_have_different_colors(labels, categories):
    colors = fills(labels, categories)
    assert all(a != b for a, b in itertools.pairwise(colors))


def test_a_class_has_its_color_in_every_picture():
    assert fills([1], THREE) == fills([1, 0], THREE)[:1] == fills([0, 1], THREE)[1:]
    assert len({*fills([0], THREE), *fills([1], THREE), *fills([2], THREE)}) == 3


def test_a_small_object_lies_on_top_of_a_large_one():
    masks = discs([(150, 100, 10), (150, 100, 60)], (200, 300))
    small_first = make_instances([0, 1], masks, None, THREE).draw(GRAY, scale=1)
    large_first = make_instances([1, 0], masks[::-1], None, THREE).draw(GRAY, scale=1)
    edge = (149, 90)  # a pixel of the small one's line
    assert small_first.getpixel(edge) == PALETTE[0]
    assert large_first.getpixel(edge) == PALETTE[0]


def test_labels_are_written_for_names_and_scores():
    plain = np.array(disc(150, 100, 40, 1, THREE).draw(GRAY, scale=1))
    scored = np.array(disc(150, 100, 40, 1, THREE, 0.5).draw(GRAY, scale=1))
    only_score = np.array(disc(150, 100, 40, score=0.5).draw(GRAY, scale=1))
    above = slice(40, 59)
    assert np.count_nonzero(plain[above] != 128) < np.count_nonzero(scored[above] != 128)
    assert np.count_nonzero(only_score[above] != 128) > 0
    assert (np.array(disc(150, 100, 40).draw(GRAY, scale=1))[above] == 128).all()  # an only class is not named


@pytest.mark.parametrize("box", [(0, 0, 99, 79), (200, 0, 299, 79), (0, 120, 99, 199), (0, 0, 299, 199), (290, 190, 299, 199)])
def test_a_label_stays_inside_the_picture(box):
    ((x0, y0, x1, y1),) = label_places([(60, 15)], [box], (300, 200))
    assert x0 >= 0
    assert y0 >= 0
    assert x1 < 300
    assert y1 < 200
    assert (x1 - x0 + 1, y1 - y0 + 1) == (60, 15)


def test_labels_do_not_lie_over_each_other():
    places = label_places([(60, 15)] * 4, [(100, 100, 180, 160)] * 4, (300, 200))
    for (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) in itertools.combinations(places, 2):
        assert ax1 < bx0 or bx1 < ax0 or ay1 < by0 or by1 < ay0


def test_in_a_crowd_small_objects_have_no_label_and_a_large_one_has():
    boxes = [(0, 0, 299, 199), *((x, y, x + 9, y + 9) for x in range(0, 300, 15) for y in range(0, 200, 15))]
    places = label_places([(60, 15)] * len(boxes), boxes, (300, 200))
    assert places[0] is not None
    assert places[1:] == [None] * (len(boxes) - 1)
    assert label_places([(60, 15)], boxes[9:10], (300, 200)) != [None]  # alone it has one


def test_a_label_larger_than_the_picture_is_left_out():
    assert label_places([(60, 15)], [(0, 0, 20, 9)], (40, 40)) == [None]


def test_masks_may_be_empty_and_boxes_reach_out_of_the_image():
    odd = Instances(
        labels=torch.tensor([0, 0, 0]),
        boxes=torch.tensor([[5.0, 5.0, 5.0, 5.0], [-50.0, -9.0, 400.0, 900.0], [310.0, 0.0, 320.0, 5.0]]),
        masks=make_instances([0, 0, 0], np.zeros((3, 200, 300), bool), None, ONE).masks,
        scores=torch.tensor([0.9, 0.8, 0.7]),
        categories=ONE,
    )
    assert odd.draw(GRAY).size == (600, 400)


def test_an_image_of_another_size_is_refused():
    with pytest.raises(ValueError, match="the image has 100 x 80 pixels, but the masks have 300 x 200"):
        disc(50, 50, 20).draw(np.zeros((80, 100, 3), np.uint8))


def test_the_image_itself_is_not_changed():
    picture = Image.fromarray(GRAY)
    disc(150, 100, 40).draw(picture, scale=1)
    assert (np.array(picture) == 128).all()
    assert (GRAY == 128).all()


# What people without one kind of cone see, of linear light (Machado, Oliveira and Fernandes 2009, severity 1).
BLINDNESS = {
    "none": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab(color: tuple[int, int, int], blindness: str) -> np.ndarray:
    """Return CIE L*a*b*, in which equal distances look about equally different."""
    value = np.array(color) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    simulated = np.clip(np.array(BLINDNESS[blindness]) @ linear, 0, 1)
    x, y, z = np.cbrt(TO_XYZ @ simulated / TO_XYZ.sum(1))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("blindness", BLINDNESS)
def test_color_blind_people_can_tell_the_colors_apart(blindness):
    distances = [np.linalg.norm(lab(a, blindness) - lab(b, blindness)) for a, b in itertools.combinations(PALETTE, 2)]
    assert min(distances) > 10, min(distances)
