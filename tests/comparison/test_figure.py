"""Which images the figure shows, from which score on, and what it says below them."""

from dataclasses import replace

import numpy as np
import torch
from fakes import Listed, Oracle, discs, make_instances
from PIL import Image

from maskset.comparison.figure import correct_detections, draw_figure, match_detections, select_images
from maskset.instances import Category

CLASSES = (Category("disc", 1), Category("ring", 2))
PLACES = [(8.0, 8.0, 6.0), (24.0, 8.0, 6.0), (16.0, 24.0, 6.0)]


def scene(labels, scores=None, places=PLACES):
    return make_instances(labels, discs(places[: len(labels)], (32, 32)), scores, CLASSES)


def size(path):
    with Image.open(path) as picture:
        return picture.size


def test_an_object_is_right_once_with_its_class_and_half_of_its_mask():
    annotated = scene([0, 1])
    elsewhere = (12.0, 8.0, 6.0)  # an overlap below one half with the first
    answers = make_instances(
        [0, 0, 0, 0], discs([PLACES[0], PLACES[0], PLACES[1], elsewhere], (32, 32)), [0.5, 0.9, 0.8, 0.95], CLASSES
    )
    assert correct_detections(answers, annotated).tolist() == [False, True, False, False]
    assert correct_detections(answers[[]], annotated).tolist() == []
    assert correct_detections(answers, annotated[[]]).tolist() == [False] * 4


def test_each_model_is_drawn_from_the_score_on_that_gives_it_the_best_f1():
    data = Listed([scene([0, 0]), scene([0])])
    unsure = {0: scene([0, 0, 1], [0.30, 0.12, 0.05]), 1: scene([0, 1], [0.20, 0.11])}
    assert match_detections(unsure, data).threshold == np.float32(0.12)
    assert match_detections(unsure, data).counts(0) == (2, 0)
    many = make_instances([0] * 7, discs([(30.0, 30.0, 2.0)] * 6 + [PLACES[0]], (32, 32)), [0.9] * 6 + [0.1], CLASSES)
    assert (
        match_detections({0: many, 1: scene([])}, data).threshold == 0.5
    )  # six wrong ones are not drawn for the sake of a right one
    assert match_detections({0: scene([1], [0.9]), 1: scene([1], [0.8])}, data).threshold == 0.5  # nothing is right anywhere
    assert match_detections({0: scene([]), 1: scene([])}, data).counts(0) == (0, 0)


def test_images_in_which_the_models_differ_come_first_then_those_with_the_most_objects():
    data = Listed([scene([0]), scene([0, 0, 0]), scene([0, 0])])
    everything = {i: scene([0] * n, [0.9] * n) for i, n in enumerate((1, 3, 2))}
    misses = everything | {2: scene([0], [0.9])}
    assert select_images([match_detections(everything, data), match_detections(misses, data)], [0, 1, 2], data.counts()) == [
        2,
        1,
        0,
    ]


def test_the_figure_has_a_column_for_each_model_and_a_row_for_each_image(tmp_path):
    scenes = [scene([0, 1], [0.9, 0.8]), scene([1], [0.7])]
    wrong = [replace(instances, labels=1 - instances.labels) for instances in scenes]
    data = Listed([replace(instances, scores=None) for instances in scenes])
    sizes = []
    for models in (["right"], ["right", "wrong"]):
        answers = {"right": ("AP 1.000", Oracle(scenes)), "wrong": ("AP 0.000", Oracle(wrong))}
        draw_figure({name: answers[name] for name in models}, data, tmp_path / "figure.png")
        sizes.append(size(tmp_path / "figure.png"))
    assert sizes[0][1] == sizes[1][1]
    assert 2 * (sizes[1][0] - sizes[0][0]) < sizes[0][0] <= 2 * (sizes[1][0] - sizes[0][0]) + 20
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]


def test_large_images_are_shrunk_and_images_without_objects_left_out(tmp_path):
    disc = make_instances([0], discs([(500, 300, 90)], (600, 1000)), [0.9], CLASSES)
    data = Listed([disc, disc[torch.tensor([False])]])
    models = {"a model with quite a long name that has no room above its column": ("AP 1.000", Oracle([disc, disc]))}
    draw_figure(models, data, tmp_path / "figure.png")
    width, height = size(tmp_path / "figure.png")
    assert width < 1000
    assert height < 400
