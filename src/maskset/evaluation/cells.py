"""The accuracy of the cell literature, TP / (TP + FP + FN), computed from the overlaps of each image."""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from maskset.evaluation.overlaps import Overlaps

IOUS = (0.5, 0.6, 0.7, 0.8, 0.9)


def cell_accuracy(images: Sequence[Overlaps], threshold: float, ious: Sequence[float] = IOUS) -> dict[float, float]:
    """Return TP / (TP + FP + FN) of masks at each minimum IoU, counted over all images and classes.

    StarDist and Cellpose call it average precision (Schmidt et al., MICCAI 2018, section 3), but unlike in COCO's, all
    detections above one score count the same. Each detection is matched with at most one target of its class, so that the
    number of pairs with the minimum IoU, TP, is the largest possible. Unmatched detections are false positives, except in
    crowds, and unmatched targets false negatives. Without detections and targets, the result is NaN.

    Args:
        images: overlaps of the detections and targets of each image.
        threshold: minimum score of a detection.
        ious: minimum IoUs of a pair.
    """
    counts = np.array([[_count(image, threshold, iou) for iou in ious] for image in images]).reshape(-1, len(ious), 3).sum(0)
    with np.errstate(invalid="ignore"):
        return dict(zip(ious, (counts[:, 0] / counts.sum(1)).tolist(), strict=True))


def _count(image: Overlaps, threshold: float, minimum: float) -> tuple[int, int, int]:
    """Return the numbers of true positives, false positives and false negatives in an image."""
    counted = image.scores >= threshold
    true, ignored = 0, 0
    for label, (masks, _) in image.ious.items():
        overlap, crowd = masks[counted[image.labels == label]], image.crowd[image.target_labels == label]
        matches = overlap[:, ~crowd] >= minimum
        pairs = linear_sum_assignment(matches, maximize=True)
        matched = np.zeros(len(overlap), bool)
        matched[pairs[0]] = matches[pairs]
        true += int(matched.sum())
        ignored += int((~matched & (overlap[:, crowd] >= minimum).any(1)).sum())
    return true, int(counted.sum()) - true - ignored, int((~image.crowd).sum()) - true
