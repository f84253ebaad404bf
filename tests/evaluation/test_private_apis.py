"""Private interfaces of other packages that the code depends on. If a test fails, a new version has changed one."""

import argparse

import faster_coco_eval.faster_eval_api_cpp as matching
from faster_coco_eval.core.cocoeval import Params
from torch.utils import _pytree as pytree


def test_faster_coco_eval_matches_targets_and_detections_by_given_ious() -> None:
    rules, targets, detections = Params("bbox"), matching.Dataset(), matching.Dataset()
    rules.maxDets, rules.imgIds, rules.catIds = [1, 10, 100], [0], [0]
    targets.append(0, 0, {"id": 1, "area": 50.0, "iscrowd": 0, "ignore": 0})
    detections.append(0, 0, {"id": 1, "score": 0.9, "area": 40.0})
    curves = matching.COCOevalEvaluateAccumulate(rules, [[[[0.72]]]], targets, detections, [0], [0], True)
    assert curves["precision"].shape == (10, 101, 1, 4, 3)
    assert curves["recall"][:, 0, 0, -1].tolist() == [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]  # IoU 0.50 to 0.95


def test_argparse_knows_its_flags_by_name() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument_group("settings").add_argument("--train.epochs")
    assert parser._option_string_actions.keys() == {"-h", "--help", "--train.epochs"}


def test_torch_maps_over_values_of_one_type_in_containers() -> None:
    assert pytree.tree_map_only(int, lambda value: value + 1, [1, {"a": 2, "b": "c"}]) == [2, {"a": 3, "b": "c"}]
