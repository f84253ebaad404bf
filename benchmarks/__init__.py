"""Benchmarks: every figure about speed and memory in the documentation is measured here, one file per benchmark.

A benchmark is a function `run(report, quick)` that makes the inputs, checks that maskset and the packages it is compared with
give the same results, and measures them in turn in one process. With `quick` the inputs are small and measured once.
"""

BENCHMARKS = {
    "attention": "deformable attention alone: each implementation that works here, against transformers",
    "inference": "whole models, from pixels to masks, against DeformableDetr, Mask2Former and Mask R-CNN",
    "training": "memory and time of training steps, against a straightforward implementation",
    "masks": "masks to run lengths and mask codecs, against torchvision, pycocotools and dense matrices",
    "loader": "reading, augmentation and targets of training images, against Pillow and dense masks",
    "evaluation": "COCO average precision, against pycocotools",
    "matching": "the cost matrix of bipartite matching, against DETR's",
    "twin": "twin attention against full attention",
    "scaling": "cost of SOLQ against image size, slots and objects, with plots",
}
