"""The benchmark of learning: budget and schedule, results that are added to earlier ones, and the peers."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import curves, learning, page
from benchmarks.__main__ import main
from benchmarks.peers import PEERS
from maskset.data.shapes import CATEGORIES, ShapesDataset
from maskset.errors import ConfigError, TrainingDiverged
from maskset.instances import Category, Instances
from maskset.recipe import Recipe, TrainConfig
from maskset.structures import ImageBatch
from maskset.systems import build
from maskset.training.run import Run
from maskset.training.state import Progress

SETTING = {
    "data": "nuclei",
    "minutes": 20.0,
    "pretrained": False,
    "device": "CPU, 1 thread",
    "train_images": 536,
    "val_images": 64,
}
SETTING |= {"classes": 1, "backbone": "resnet10t", "short_sides": [224, 256], "short_side": 256, "batch_size": 4}
SETTING |= {"max_detections": 300}


def run_of(model: str, seed: int = 0, ap: float = 0.2, steps: int = 400) -> dict:
    """Return the results of a run with two points."""
    values = dict.fromkeys(curves.METRICS, ap) | {"mask_ap_large": None}
    points = [
        {"share": share, "seconds": 1200 * share, "steps": int(steps * share), **values, "mask_ap": ap * share}
        for share in (0.5, 1.0)
    ]
    where = {"commit": "abc", "machine": {"cpu": "Xeon", "cores": 2, "gpu": None, "python": "3.11"}, "versions": {"torch": "2"}}
    return {"model": model, "seed": seed, "parameters": 6_000_000, "points": points, "command": f"python -m {model}", **where}


@pytest.mark.filterwarnings("ignore")  # other packages warn as they like
def test_a_quick_run_trains_a_recipe_and_both_peers_and_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["learning", "--quick"]) == 0
    output = capsys.readouterr().out
    for name in ("solq-tiny", *PEERS):
        assert f"| {name} " in output
        assert f"learning shapes --models {name} --minutes 0.002 --seeds 0`" in output
    assert not list(tmp_path.iterdir())


class SimulatedRun(Run):
    """A run whose steps are only counted, with 7 batches in an epoch."""

    def __init__(self, config: TrainConfig) -> None:
        state = SimpleNamespace(optimizer=None, averaged=None)
        recipe, progress = Recipe(model=PEERS["mask-rcnn"](), train=config), Progress()
        self.__dict__ |= {"recipe": recipe, "state": state, "progress": progress, "steps": 7, "accelerator": None, "step": None}

    def batches(self, epoch: int):
        return iter([("images", "targets")] * 7)


def simulate(monkeypatch, durations, config: TrainConfig) -> tuple[list[float], list[float]]:
    """Return used time and rates of the steps of `learning.train` with a budget of 100 s, whose steps take `durations`."""
    times, now, used, rates = iter(durations), [0.0], [], []
    monkeypatch.setattr(learning, "clock", lambda: now[0])
    monkeypatch.setattr(learning, "set_learning_rates", lambda optimizer, factor: rates.append(factor))

    def update(*_) -> None:
        now[0] += next(times)

    monkeypatch.setattr(learning, "update", update)
    run = SimulatedRun(config)
    for seconds in learning.train(run, 100.0):
        used.append(seconds)
        now[0] += 50  # evaluation
        if seconds >= 100:
            return used, rates
    raise AssertionError


@pytest.mark.parametrize("durations", [[1.0] * 200, [1.0] * 40 + [3.0] * 160, [2.0] * 30 + [0.5] * 170])
def test_the_learning_rate_follows_the_used_time_at_any_speed_and_evaluation_is_not_counted(durations, monkeypatch):
    config = TrainConfig(schedule="cosine", warmup_steps=10)
    used, rates = simulate(monkeypatch, durations, config)
    assert used == pytest.approx(torch.tensor(durations).cumsum(0)[: len(used)].tolist())
    assert 100 <= used[-1] < 100 + max(durations)
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[-1] < 0.01
    done = torch.tensor([0.0, *used[:-1]]) / 100
    share = (done - 10 * done / torch.arange(len(done)).clamp(min=1)) / (1 - 10 * done / torch.arange(len(done)).clamp(min=1))
    assert rates[10:] == pytest.approx(((1 + torch.cos(torch.pi * share)) / 2)[10:].tolist(), abs=0.02)


def test_drops_of_a_step_schedule_are_at_their_share_of_the_time(monkeypatch):
    config = TrainConfig(schedule="step", epochs=10, drop_epochs=(8,), warmup_steps=0)
    used, rates = simulate(monkeypatch, [1.0] * 50 + [2.0] * 50, config)
    before = [seconds for seconds, rate in zip([0.0, *used[:-1]], rates, strict=True) if rate == 1]
    assert before[-1] == pytest.approx(80, abs=2)


def test_all_models_have_the_same_images_size_batch_and_backbone():
    options = learning.parse(["shapes:", "--minutes", "3", "--pretrained"])
    setting = learning.setting_of(options)
    assert {"solq-small", "sotr-small", "mask-rcnn", "mask2former"} <= set(options.models)
    recipes = [learning.recipe_of(name, setting, 5) for name in options.models]
    assert len({recipe.data for recipe in recipes}) == 1
    assert recipes[0].data.workers == 0
    for recipe in recipes:
        assert recipe.model.backbone == learning.PRETRAINED
        assert (recipe.model.input.short_side, recipe.model.input.long_side) == (256, 384)
        assert (recipe.train.batch_size, recipe.train.seed) == (4, 5)
    with pytest.raises(ConfigError, match="no model 'mask-cnn': --models takes .*mask-rcnn, mask2former, solq-r50"):
        learning.recipe_of("mask-cnn", setting, 0)


def test_finished_runs_are_not_repeated_and_a_failure_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    done = []

    def measure(recipe, data, setting, title) -> dict:
        if recipe.model.system == "solq":
            raise TrainingDiverged("the loss is NaN.")
        done.append(title)
        return {name: value for name, value in run_of("any").items() if name in ("parameters", "points")}

    monkeypatch.setattr(learning, "measure", measure)
    call = ["learning", "shapes:", "--seeds", "0", "1", "--out", str(tmp_path), "--models"]
    assert main([*call, "solq-small", "mask-rcnn"]) == 1
    assert "solq-small, seed 1 failed: the loss is NaN." in capsys.readouterr().err
    assert main([*call, "mask-rcnn", "mask2former"]) == 0
    assert done == ["mask-rcnn, seed 0", "mask-rcnn, seed 1", "mask2former, seed 0", "mask2former, seed 1"]
    assert main([*call, "mask2former", "--again"]) == 0
    assert done[4:] == ["mask2former, seed 0", "mask2former, seed 1"]
    result = json.loads((tmp_path / "results" / "learning-shapes-20min.json").read_text())
    assert [(run["model"], run["seed"]) for run in result["runs"]] == [
        ("mask-rcnn", 0),
        ("mask-rcnn", 1),
        ("mask2former", 0),
        ("mask2former", 1),
    ]
    assert str(tmp_path) not in json.dumps(result)
    assert "## [learning-shapes-20min]" in (tmp_path / "README.md").read_text()
    assert b"<svg" in (tmp_path / "learning-shapes-20min.svg").read_bytes()


def test_results_of_another_setting_are_not_mixed(tmp_path):
    path = curves.save(run_of("solq-small"), SETTING, tmp_path)
    assert path.name == "learning-nuclei-20min.json"
    with pytest.raises(ConfigError, match="learning-nuclei-20min.json has results of another setting.*val_images was 64, is 65"):
        curves.read(SETTING | {"val_images": 65}, tmp_path)
    assert curves.result_path(SETTING | {"pretrained": True}, tmp_path).name == "learning-nuclei-20min-pretrained.json"
    assert curves.result_path(SETTING | {"device": "H200"}, tmp_path).name == "learning-nuclei-20min-gpu.json"


def test_the_page_has_medians_over_seeds_and_the_figure_depends_on_results_alone(tmp_path):
    for run in (run_of("b"), run_of("a", 0, 0.3, 100), run_of("a", 1, 0.5, 300), run_of("a", 2, 0.4, 200)):
        path = curves.save(run, SETTING, tmp_path)
    result = json.loads(path.read_text())
    text = page.page({path.name: result})
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith(("| a ", "| b "))]
    assert lines[0] == ["a", "3", "6.0", "200", "6.00", "0.400", "0.400", "0.400", "0.400", "0.400", "", "0.400", ""]
    assert lines[2:] == [["a", "0.200", "0.400"], ["b", "0.100", "0.200"]]
    assert "a: mask AP of the seeds from 0.300 to 0.500." in text
    assert "![AP against time](learning-nuclei-20min.svg)" in text
    first = curves.draw(result, tmp_path / "figure.svg").read_bytes()
    assert first == curves.draw(result, tmp_path / "figure.svg").read_bytes()


def peer(name: str, **settings):
    torch.manual_seed(0)
    return build(replace(PEERS[name](), num_classes=len(CATEGORIES), **settings), CATEGORIES)


def example(sizes=((64, 96), (96, 64))) -> tuple[ImageBatch, list[Instances]]:
    samples = [ShapesDataset("train", 1, size).read(0) for size in sizes]
    return ImageBatch.from_images([pixels for pixels, _ in samples], 32), [targets for _, targets in samples]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PEERS)
def test_every_weight_of_a_peer_learns_also_beside_an_image_without_objects(name):
    model, (images, targets) = peer(name).train(), example()
    images = images.normalized(model.input)
    terms = model.loss(model(images), images, [targets[0], targets[1][:0]])
    torch.stack(list(terms.values())).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PEERS)
def test_results_of_a_peer_have_the_size_of_the_image_and_the_best_come_first(name):
    few = {"proposals": 50, "detections": 30} if name == "mask-rcnn" else {}
    model, (images, _) = peer(name, **few).eval(), example()
    images = images.normalized(model.input)
    sizes = [(128, 192), (48, 32)]
    for detections, (height, width) in zip(model.postprocess(model(images), images, sizes, limit=20), sizes, strict=True):
        assert len(detections) == 20
        assert detections.masks.size == (height, width)
        assert (detections.scores.diff() <= 0).all()
        assert set(detections.labels.tolist()) <= {0, 1, 2}
        assert detections.boxes.min() >= 0
        assert (detections.boxes.amax(0) <= torch.tensor([width, height, width, height])).all()
    assert not len(model.postprocess(model(images), images, sizes, threshold=1.0)[0])


def test_mask_rcnn_learns_with_the_background_as_class_0_and_scales_boxes_and_masks(monkeypatch):
    model, (images, targets) = peer("mask-rcnn").eval(), example(((64, 96),))
    target = model._target(targets[0], torch.device("cpu"))
    assert target["labels"].tolist() == (targets[0].labels + 1).tolist()
    detections = {
        "boxes": torch.tensor([[8.0, 16, 24, 48]]),
        "masks": torch.ones(1, 1, 28, 28),
        "labels": torch.tensor([2]),
        "scores": torch.tensor([0.7]),
    }
    monkeypatch.setattr(model, "_compute", lambda images: ([detections], {}))
    (result,) = model.postprocess(model(images), images, [(128, 288)])
    assert result.boxes.tolist() == [[24, 32, 72, 96]]
    assert result.names == ["rectangle"]
    filled = result.masks.dense()[0]
    assert filled[34:94, 27:69].all()
    assert filled.sum() <= 49 * 65


def test_mask2former_draws_a_mask_without_the_padding_at_the_size_of_the_image(monkeypatch):
    model = peer("mask2former").eval()
    logits = torch.full((1, 2, 16, 16), -4.0)
    logits[0, 1, 4:8, 8:] = 4.0  # over the image's right edge
    class_logits = torch.tensor([[[0.0, 0, 0, 5], [0, 0, 9, 0]]])
    output = SimpleNamespace(class_queries_logits=class_logits, masks_queries_logits=logits)
    monkeypatch.setattr(model.network, "forward", lambda pixels: output)
    images = ImageBatch(torch.zeros(1, 3, 64, 64), torch.tensor([[64, 48]]))
    (result,) = model.postprocess(model(images), images, [(128, 96)], limit=1)
    expected = torch.zeros(1, 128, 96, dtype=torch.bool)
    expected[0, 32:64, 64:] = True
    assert (result.masks.dense() ^ expected).sum() <= 12  # corners are rounded
    assert result.boxes.tolist() == [[64, 32, 96, 64]]
    assert result.categories[result.labels[0]] == Category("triangle", 3)
    probability = class_logits[0, 1].softmax(0)[2] * torch.tensor(4.0).sigmoid()
    assert result.scores.tolist() == pytest.approx([probability.item()])


def test_a_model_can_have_other_settings():
    setting = learning.Setting(**SETTING | {"long_side": 384})
    recipe = learning.recipe_of("solq-small:model.num_queries=7:train.learning_rate=0.5", setting, 0)
    assert (recipe.model.num_queries, recipe.train.learning_rate) == (7, 0.5)
    wrong = {
        "model.num_querys=7": "did you mean model.num_queries",
        "model.num_queries": "the value of model.num_queries is missing",
        "train.batch_size=8": "train.batch_size is the same for all models",
    }
    for change, message in wrong.items():
        with pytest.raises(ConfigError, match=message):
            learning.recipe_of(f"solq-small:{change}", setting, 0)


def test_nms_removes_the_duplicates_that_a_model_reports(monkeypatch):
    counted = []
    count = lambda dataset, detections, limit: counted.extend(detections) or SimpleNamespace(mask_ap=0.5)  # noqa: E731
    monkeypatch.setattr(learning, "average_precision", count)
    data = ShapesDataset("val", count=1)
    objects = data.targets(0)
    twice = [*range(len(objects)), *range(len(objects))]
    scores = torch.linspace(0.1, 0.9, len(twice))
    assert learning.mask_ap_with_nms([(0, replace(objects[twice], scores=scores))], data, 100) == 0.5
    ((index, remaining),) = counted
    assert index == 0
    assert sorted(remaining.scores.tolist()) == scores[len(objects) :].tolist()
