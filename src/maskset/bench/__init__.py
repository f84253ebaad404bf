"""Benchmarks: every number about speed and memory that the documentation tells comes from here, one file for each.

A benchmark is a function `run(report, quick)` that makes the inputs, checks that maskset and its peers compute the same, and
measures them in turn in one process. With `quick` everything is small and measured once: it shows that results agree.
"""

BENCHES = {
    "attention": "Time deformable attention alone, in every implementation that works here, against transformers'.",
    "inference": "Time whole models, from pixels to masks, against DeformableDetr, Mask2Former and Mask R-CNN.",
    "training": "Measure memory and time of training steps against the straightforward way.",
    "masks": "Time masks to run lengths and mask codes against torchvision, pycocotools and dense matrices.",
    "loader": "Time reading, augmentation and targets of training images against Pillow and dense masks.",
    "evaluation": "Time COCO's average precision against pycocotools.",
    "matching": "Time the cost matrix of bipartite matching against DETR's.",
    "twin": "Time twin attention against full attention.",
    "scaling": "Measure SOLQ against image size, slots and objects, and draw the curves.",
}
