"""The accuracy of the cell literature."""

import numpy as np
import pytest

from maskset.evaluation.cells import cell_accuracy
from maskset.evaluation.overlaps import Overlaps


def image(scores, ious, crowd=()) -> Overlaps:
    """Return an image whose detections and targets have the given IoUs, in one class."""
    matrix = np.array(ious, float)
    targets = matrix.shape[1]
    return Overlaps(
        labels=np.zeros(len(scores), np.int64),
        scores=np.array(scores, float),
        areas=np.ones((2, len(scores))),
        target_labels=np.zeros(targets, np.int64),
        target_areas=np.ones(targets),
        crowd=np.isin(np.arange(targets), crowd),
        ious={0: np.stack([matrix, matrix])},
    )


def test_pairs_unmatched_detections_and_unmatched_targets_are_counted_over_all_images():
    first = image([0.9, 0.8], [[0.7, 0.0, 0.0], [0.0, 0.55, 0.0]])  # 2 pairs at 0.5, 1 at 0.6
    second = image([0.9, 0.3], [[0.95], [0.0]])  # the second detection has a low score
    assert cell_accuracy([first, second], 0.5) == pytest.approx({0.5: 3 / 4, 0.6: 2 / 5, 0.7: 2 / 5, 0.8: 1 / 6, 0.9: 1 / 6})
    assert cell_accuracy([first, second], 0.2, [0.5]) == {0.5: 3 / 5}


def test_the_number_of_pairs_is_the_largest_possible():
    both = image([0.9, 0.8], [[0.7, 0.6], [0.65, 0.0]])  # the best pair of the first would leave the second without a target
    assert cell_accuracy([both], 0.5, [0.5]) == {0.5: 1.0}


def test_a_duplicate_is_wrong_and_a_detection_in_a_crowd_does_not_count():
    assert cell_accuracy([image([0.9, 0.8], [[0.9], [0.9]])], 0.5, [0.5]) == {0.5: 0.5}
    assert cell_accuracy([image([0.9, 0.8], [[0.9, 0.0], [0.0, 0.9]], crowd=[1])], 0.5, [0.5]) == {0.5: 1.0}


def test_without_detections_it_is_zero_and_without_objects_undefined():
    assert cell_accuracy([image([], np.zeros((0, 2)))], 0.5, [0.5]) == {0.5: 0.0}
    assert np.isnan(cell_accuracy([], 0.5, [0.5])[0.5])
