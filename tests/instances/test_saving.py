"""Results as files: COCO JSON, label images, drawings; whole or not at all."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import discs, make_instances
from PIL import Image

from maskset.data import CocoDataset
from maskset.errors import ConfigError, DataError
from maskset.instances import Category, Instances, Masks
from maskset.instances.saving import save_predictions

CLASSES = (Category("cell", 4), Category("grüne Zelle", 9))
PIXELS = np.full((40, 50, 3), 128, np.uint8)


def objects(scores: list[float] | None = None) -> Instances:
    return make_instances([1, 0], discs([(15, 15, 9), (22, 15, 9)], (40, 50)), scores, CLASSES)


def test_the_json_is_a_coco_file_that_can_be_read_back(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    path = objects([0.9, 0.25]).save(tmp_path / "a.json", tmp_path / "a.png")
    content = json.loads(path.read_text(encoding="utf-8"))
    assert [row["score"] for row in content["annotations"]] == [pytest.approx(0.9), 0.25]
    assert [row["id"] for row in content["annotations"]] == [1, 2]
    again = CocoDataset(path, tmp_path)
    assert again.targets(0).masks == objects().masks
    assert again.targets(0).names == ["grüne Zelle", "cell"]


def test_annotations_have_no_score_and_no_image_has_to_be_named(tmp_path):
    content = json.loads(objects().save(tmp_path / "a.json").read_text(encoding="utf-8"))
    assert "score" not in content["annotations"][0]
    assert content["images"] == [{"id": 1, "file_name": "", "height": 40, "width": 50}]


def test_a_label_image_numbers_the_objects_and_the_first_wins_where_they_overlap(tmp_path):
    with Image.open(objects().save(tmp_path / "a.png")) as picture:
        assert picture.mode == "I;16"
        labels = np.array(picture)
    first, second = objects().masks.dense().numpy()
    assert (labels[first] == 1).all()
    assert (labels[second & ~first] == 2).all()
    assert (labels[~first & ~second] == 0).all()
    assert (second & first).any()


def test_a_label_image_can_number_more_objects_than_eight_bits(tmp_path):
    masks = np.zeros((300, 1, 300), bool)
    masks[np.arange(300), 0, np.arange(300)] = True
    with Image.open(make_instances([0] * 300, masks, None, CLASSES).save(tmp_path / "a.png")) as picture:
        assert np.array(picture)[0].tolist() == list(range(1, 301))


def test_more_objects_than_sixteen_bits_are_refused(tmp_path):
    count = 65536
    counts = [torch.tensor([4], dtype=torch.int32)] * count
    many = Instances(torch.zeros(count, dtype=torch.int64), torch.zeros(count, 4), Masks(counts, (2, 2)), None, CLASSES)
    with pytest.raises(ValueError, match="at most 65535 objects, got 65536"):
        many.save(tmp_path / "a.png")


@pytest.mark.parametrize(("name", "format"), [("a.png", "PNG"), ("a.jpg", "JPEG"), ("a.JPEG", "JPEG")])
def test_with_the_image_the_objects_are_drawn(tmp_path, name, format):
    with Image.open(objects([0.9, 0.8]).save(tmp_path / name, PIXELS)) as picture:
        assert picture.format == format
        assert picture.size == (800, 640)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.jpg", "a drawing needs the image"),
        ("a.txt", r"'a\.txt': the ending must be \.json, \.png or \.jpg"),
        ("a", "the ending must be"),
    ],
)
def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        objects().save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def several(folder: Path) -> list[tuple[Path, Instances]]:
    files = [folder / "a.png", folder / "other" / "A.jpg", folder / "b.png"]
    (folder / "other").mkdir(parents=True)
    for file in files:
        Image.fromarray(PIXELS).save(file)
    return [(file, objects([0.9, 0.8])) for file in files]


def test_the_results_of_many_files_are_one_json_and_a_drawing_of_each(tmp_path):
    answers = several(tmp_path / "in")
    out = save_predictions(iter(answers), tmp_path / "out")
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*.*")) == [
        "drawings/A_2.jpg",
        "drawings/a.jpg",
        "drawings/b.jpg",
        "results.json",
    ]
    content = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert [image["file_name"] for image in content["images"]] == ["a.png", "other/A.jpg", "b.png"]
    assert [row["image_id"] for row in content["annotations"]] == [1, 1, 2, 2, 3, 3]
    assert [row["id"] for row in content["annotations"]] == [1, 2, 3, 4, 5, 6]
    assert len(CocoDataset(out / "results.json", tmp_path / "in")) == 3


def test_files_given_from_different_places_are_named_from_the_folder_above_them(tmp_path, monkeypatch):
    answers = several(tmp_path / "in")
    monkeypatch.chdir(tmp_path / "in" / "other")
    relative = [Path("../a.png"), Path("A.jpg")]
    out = save_predictions(zip(relative, [instances for _, instances in answers], strict=False), tmp_path / "out")
    content = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert [image["file_name"] for image in content["images"]] == ["a.png", "other/A.jpg"]


def test_nothing_is_made_where_the_first_image_fails(tmp_path):
    def broken():
        raise ValueError("broken.png cannot be read")
        yield

    with pytest.raises(ValueError, match="broken.png"):
        save_predictions(broken(), tmp_path / "out", labels=True)
    assert not (tmp_path / "out").exists()


def test_earlier_predictions_in_the_folder_are_replaced_and_other_files_are_left_alone(tmp_path):
    answers, out = several(tmp_path / "in"), tmp_path / "out"
    save_predictions(answers, out, labels=True)
    (out / "drawings" / "mine.jpg").write_text("mine")
    save_predictions(answers[2:], out)
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*.*")) == [
        "drawings/b.jpg",
        "drawings/mine.jpg",
        "results.json",
    ]


def test_earlier_predictions_survive_a_run_that_fails(tmp_path):
    answers, out = several(tmp_path / "in"), tmp_path / "out"
    save_predictions(answers, out, labels=True)
    before = {path: path.read_bytes() for path in out.rglob("*.*")}

    def broken():
        yield answers[0]
        raise DataError("broken.png cannot be read")

    with pytest.raises(DataError, match="broken.png"):
        save_predictions(broken(), out, labels=True)
    assert {path: path.read_bytes() for path in out.rglob("*.*")} == before


def test_drawings_can_be_sources_of_the_next_run(tmp_path):
    answers, out = several(tmp_path / "in"), tmp_path / "out"
    save_predictions(answers, out)
    drawings = sorted((out / "drawings").iterdir())
    nothing = Instances.empty((640, 800), CLASSES)
    save_predictions(((file, nothing) for file in drawings if file.read_bytes()), out)
    assert sorted((out / "drawings").iterdir()) == drawings


def test_a_drawing_does_not_replace_an_image_that_is_not_read_yet(tmp_path):
    drawing = tmp_path / "out" / "drawings" / "a.jpg"
    drawing.parent.mkdir(parents=True)
    for file in (tmp_path / "a.png", drawing):
        Image.new("RGB", (50, 40)).save(file)
    before, seen = drawing.read_bytes(), []

    def predictions():
        yield tmp_path / "a.png", objects([0.9, 0.8])
        seen.append(drawing.read_bytes())
        yield drawing, objects([0.9, 0.8])

    save_predictions(predictions(), tmp_path / "out")
    assert seen == [before]
    assert drawing.read_bytes() != before
    assert sorted(path.name for path in drawing.parent.iterdir()) == ["a.jpg", "a_2.jpg"]


@pytest.mark.parametrize("content", ["[]", '{"images": [{"file_name": 5}]}', "no json"])
def test_a_results_json_of_another_program_is_replaced(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    save_predictions(several(tmp_path / "in"), tmp_path)
    assert "annotations" in json.loads((tmp_path / "results.json").read_text())


def test_a_second_process_that_writes_to_the_same_folder_is_refused(tmp_path):
    answers = several(tmp_path / "in")

    def during():
        yield answers[0]
        with pytest.raises(ConfigError, match="another process is writing to the folder"):
            save_predictions(answers, tmp_path / "out")
        yield answers[1]

    save_predictions(during(), tmp_path / "out")
    save_predictions(answers, tmp_path / "out")


def test_a_file_name_that_is_not_utf8_survives_in_the_json(tmp_path):
    file = Path(os.fsdecode(bytes(tmp_path / "in") + b"/bad\xff.png"))
    several(tmp_path / "in")
    Image.fromarray(PIXELS).save(file)
    out = save_predictions([(file, objects([0.9, 0.8]))], tmp_path / "out")
    (image,) = json.loads((out / "results.json").read_text(encoding="utf-8"))["images"]
    assert file.parent / image["file_name"] == file
    assert len(list((out / "drawings").iterdir())) == 1


def test_label_images_are_written_on_request_and_drawings_can_be_left_out(tmp_path):
    out = save_predictions(several(tmp_path / "in"), tmp_path / "out", drawings=False, labels=True)
    assert sorted(path.name for path in out.iterdir()) == ["labels", "results.json"]
    assert sorted(path.name for path in (out / "labels").iterdir()) == ["A_2.png", "a.png", "b.png"]


def test_drawings_never_replace_the_images_they_show(tmp_path):
    answers = several(tmp_path)
    before = {file: file.read_bytes() for file, _ in answers}
    save_predictions(answers, tmp_path, labels=True)
    assert {file: file.read_bytes() for file in before} == before


def test_instances_save_and_draw_themselves(tmp_path):
    assert objects().save(tmp_path / "a.json").exists()
    assert objects().draw(PIXELS).size == (800, 640)
