"""Prediction: each image's objects, in order, independent of the other images."""

import inspect
import io
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from fakes import Mean
from PIL import Image

from maskset.errors import ConfigError, DataError, SourceError
from maskset.inference.predict import predict, predict_files, predict_items
from maskset.instances import Category

CLASSES = (Category("thing", 1),)
SIZES = [(20, 30), (30, 20), (20, 30), (21, 30), (20, 30), (40, 40)]


def model(**settings) -> Mean:
    return Mean(CLASSES, short_side=20, long_side=64, divisor=16, **settings).eval()


def pictures(count: int = len(SIZES), seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 255, (*SIZES[i % len(SIZES)], 3), dtype=np.uint8) for i in range(count)]


def test_one_picture_gives_instances_at_its_own_size():
    detections = predict(model(), pictures()[5], threshold=0)
    assert detections.masks.size == (40, 40)
    assert detections.names == ["thing"]


def test_a_result_does_not_depend_on_the_other_pictures():
    images = pictures()
    alone = [predict(model(), image, threshold=0).scores.item() for image in images]
    assert len({round(score, 4) for score in alone}) == len(images)  # the fake sees every pixel, and the padding
    together = [detections.scores.item() for detections in predict(model(), images, threshold=0)]
    assert together == pytest.approx(alone, abs=1e-6)


def test_pictures_of_one_canvas_share_batches_and_the_order_stays():
    fake, images = model(), pictures(100)
    answers = list(predict(fake, images, threshold=0))
    assert [detections.masks.size for detections in answers] == [image.shape[:2] for image in images]
    assert max(fake.batches) == 16
    assert sum(fake.batches) == 100
    assert [detections.scores.item() for detections in answers] == pytest.approx(
        [(i / 255).mean() * s for i, s in zip(images, shares(images), strict=True)], abs=0.02
    )


def shares(images: list[np.ndarray]) -> list[float]:
    """Return which share of its canvas each picture covers: the shorter side becomes 20, the canvas a multiple of 16."""
    fitted = [(20 * h // min(h, w), 20 * w // min(h, w)) for h, w, _ in (image.shape for image in images)]
    return [h * w / (-(-h // 16) * 16) / (-(-w // 16) * 16) for h, w in fitted]


def test_results_come_as_soon_as_their_batch_is_done():
    fake, counts = model(), []
    for number, (item, _) in enumerate(
        predict_items(fake, range(40), lambda i: torch.full((3, 20, 20), i, dtype=torch.uint8), limit=1, batch_size=2)
    ):
        assert item == number
        counts.append(sum(fake.batches))
    assert counts == [2 * (i // 2 + 1) for i in range(40)]


def test_few_pictures_are_kept_in_memory():
    read = []

    def reading(i: int) -> torch.Tensor:
        read.append(i)
        return torch.zeros(3, 20, 20, dtype=torch.uint8)

    next(predict_items(model(), range(1000), reading, limit=1))
    assert len(read) < 100


def test_items_without_a_picture_are_left_out():
    answers = predict_items(
        model(), range(6), lambda i: None if i in (0, 3) else torch.zeros(3, 20, 20, dtype=torch.uint8), limit=1
    )
    assert [item for item, _ in answers] == [1, 2, 4, 5]


def test_threshold_and_limit_reach_the_model():
    image = np.full((20, 20, 3), 100, np.uint8)
    score = predict(model(), image, threshold=0).scores.item()
    assert len(predict(model(), image, threshold=score - 0.01)) == 1
    assert len(predict(model(), image, threshold=score + 0.01)) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 50}, "between 0 and 1, got 50"),
        ({"threshold": float("nan")}, "between 0 and 1, got nan"),
        ({"limit": 0}, "at least 1 .*, got 0"),
        ({"limit": 10**30}, r"below 2\^31"),
        ({"threshold": "0.5"}, "threshold must be a number between 0 and 1, got '0.5'"),
        ({"threshold": None}, "threshold must be a number between 0 and 1, got None"),
        ({"limit": 2.5}, "limit must be a whole number, .*got 2.5"),
        ({"limit": True}, "limit must be a whole number, .*got True"),
    ],
)
def test_settings_that_are_not_allowed_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        inspect.unwrap(predict)(model(), pictures()[0], **settings)  # without the type checker of the tests


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.nn.Linear(1, 1), "a.png"), ConfigError, "a model is a system of maskset .*, got torch.nn.modules.linear.Linear"),
        ((None, "a.png"), ConfigError, "a model is a system of maskset"),
        (("a.png", "model.safetensors"), ConfigError, "a.png is an image: the model comes first, then the images"),
        ((pictures()[0], model()), SourceError, "the images are the second argument and the model the first, got a Mean second"),
        (("https://example.org/model.safetensors", "a.png"), ConfigError, "is an address: download the model"),
        (("", "a.png"), ConfigError, "the name of the model is empty"),
        ((model(), "https://example.org/a.png"), SourceError, "there is no file or folder https://.* Download it"),
        ((model(), ""), SourceError, "the file name is empty"),
        ((model(), (image for image in pictures())), SourceError, "generator is not an image. .*several images are a list"),
    ],
)
def test_arguments_of_another_kind_or_in_another_order_are_refused_at_the_call(arguments, error, message):
    with pytest.raises(error, match=message):
        inspect.unwrap(predict)(*arguments)


def test_a_file_gives_instances_and_a_folder_an_iterator(tmp_path):
    for i, image in enumerate(pictures(3)):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    detections = predict(model(), tmp_path / "1.png", threshold=0)
    assert detections.masks.size == (30, 20)
    sizes = [(20, 30), (30, 20), (20, 30)]
    assert [detections.masks.size for detections in predict(model(), str(tmp_path), threshold=0)] == sizes
    assert [detections.masks.size for detections in predict(model(), f"{tmp_path}/[01].png", threshold=0)] == sizes[:2]


def test_a_missing_file_is_reported_at_the_call(tmp_path):
    with pytest.raises(SourceError, match="there is no file or folder"):
        predict(model(), [tmp_path / "missing.png"])


@pytest.mark.parametrize("source", [[[pictures()[0]]], None, 5, [pictures()[0], None], np.zeros((2, 9, 9, 3), np.uint8), {}])
def test_a_source_of_another_type_is_reported_at_the_call(source):
    with pytest.raises(SourceError, match="An image is a file name"):
        inspect.unwrap(predict)(model(), source)  # without the type checker of the tests


def test_bytes_give_the_objects_of_the_file(tmp_path):
    Image.fromarray(pictures()[0]).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    expected = predict(model(), tmp_path / "a.png", threshold=0)
    for source in (data, io.BytesIO(data)):
        assert predict(model(), source, threshold=0).scores.tolist() == expected.scores.tolist()
    assert [len(detections) for detections in predict(model(), [data, io.BytesIO(data)], threshold=0)] == [1, 1]


@pytest.mark.parametrize(
    "device",
    ["gpu", "meta", "cuda:99", pytest.param("mps", marks=pytest.mark.skipif(sys.platform == "darwin", reason="it exists"))],
)
def test_a_device_that_cannot_be_used_is_reported_with_those_that_can(device):
    fake = model()
    with pytest.raises(ConfigError, match=r"device .* cannot be used \(.*\). Available here: cpu") as error:
        predict(fake, pictures()[0], device=device)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_pixels_are_cast_to_the_type_of_the_model(dtype):
    class Typed(Mean):
        def forward(self, images):
            assert images.pixels.dtype == self.weight.dtype
            return super().forward(replace(images, pixels=images.pixels.float()))

    fake = Typed(CLASSES, short_side=20, long_side=64, divisor=16).eval()
    fake.weight = torch.nn.Parameter(torch.zeros(1))
    assert len(predict(fake.to(dtype), pictures()[0], threshold=0)) == 1


def test_a_prediction_that_ends_leaves_another_thread_in_evaluation_mode():
    fake, image, started, go_on, results = model().train(), pictures()[0], threading.Event(), threading.Event(), []
    slow = threading.Thread(target=lambda: results.append(predict(fake, image, threshold=0)))

    def wait(*_: object) -> None:
        if threading.current_thread() is slow:
            started.set()
            go_on.wait(20)

    fake.register_forward_pre_hook(wait)
    slow.start()
    assert started.wait(20)
    predict(fake, image)
    assert not fake.training
    go_on.set()
    slow.join(20)
    assert len(results) == 1
    assert fake.training


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not more than that")
    with pytest.raises(DataError, match=r"broken\.jpg"):
        predict(model(), tmp_path / "broken.jpg")
    with pytest.raises(DataError, match=r"broken\.jpg"):
        list(predict(model(), tmp_path))


def some_broken(folder):
    for i, picture in enumerate(pictures(3)):
        Image.fromarray(picture).save(folder / f"{i}.png")
    (folder / "1.png").write_bytes(b"no picture")
    (folder / "3.png").write_bytes(b"no picture")
    return folder


def test_files_that_cannot_be_read_are_left_out_on_request_and_named_at_the_end(tmp_path, capsys):
    answers = predict_files(model(), [some_broken(tmp_path)], threshold=0, skip_broken=True)
    assert [(file.name, detections.masks.size) for file, detections in answers] == [("0.png", (20, 30)), ("2.png", (20, 30))]
    *_, count, first, second = capsys.readouterr().err.splitlines()
    assert count == "left out because they cannot be read: 2 of 4 images"
    assert "1.png cannot be read as an image" in first
    assert "3.png cannot be read as an image" in second
    assert len(list(predict(model(), tmp_path, threshold=0, skip_broken=True))) == 2
    assert "2 of 4 images" in capsys.readouterr().err


def test_a_file_that_cannot_be_read_ends_with_the_way_to_leave_it_out(tmp_path):
    with pytest.raises(DataError, match=r"1\.png cannot be read.* No results.json is written; --skip-broken"):
        list(predict_files(model(), [some_broken(tmp_path)], threshold=0))


def test_where_nothing_can_be_read_there_is_no_result_to_give(tmp_path):
    broken = [some_broken(tmp_path) / name for name in ("1.png", "3.png")]
    with pytest.raises(DataError, match=r"none of 2 images can be read. The first: .*1\.png"):
        list(predict_files(model(), broken, skip_broken=True))
    with pytest.raises(DataError, match=r"1\.png cannot be read"):
        predict(model(), broken[0], skip_broken=True)


def test_files_come_with_their_results_and_a_line_of_progress(tmp_path, capsys):
    for i, image in enumerate(pictures(3)):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    answers = list(predict_files(model(), [tmp_path / "2.png", f"{tmp_path}/[01].png"], threshold=0))
    assert [(file.name, detections.masks.size) for file, detections in answers] == [
        ("2.png", (20, 30)),
        ("0.png", (20, 30)),
        ("1.png", (30, 20)),
    ]
    assert "predicting: 3 of 3 images" in capsys.readouterr().err


def test_gradients_stay_on_for_the_caller_between_results():
    for _ in predict(model(), pictures(3)):
        assert torch.is_grad_enabled()


def test_a_model_in_training_is_in_training_afterwards():
    fake = model().train()
    fake.frozen.eval()
    predict(fake, pictures()[0])
    assert fake.training
    assert not fake.frozen.training


def test_a_model_given_by_name_is_loaded(monkeypatch):
    asked = []
    monkeypatch.setattr("maskset.checkpoint.load", lambda source: asked.append(source) or model())
    assert len(predict("runs/7", pictures()[0], threshold=0, device="cpu")) == 1
    assert asked == ["runs/7"]
