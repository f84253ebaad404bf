"""Layouts are recognized, and what is not recognized is explained."""

import json
import shutil
from pathlib import Path

import pytest
from coco_files import annotation, coco, write

from maskset.data import CocoDataset, ShapesDataset, open_data
from maskset.errors import DataError


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return write(tmp_path / "plain", coco([annotation()]))


def test_a_json_file_beside_its_image_folder_is_recognized(plain: Path) -> None:
    assert len(open_data(plain, "train").targets(0)) == 1


@pytest.mark.parametrize("name", ["train", "train2017"])
def test_cocos_own_layout_is_recognized(tmp_path: Path, plain: Path, name: str) -> None:
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    shutil.copy(plain / "instances_train.json", tmp_path / "coco" / "annotations" / f"instances_{name}.json")
    shutil.copytree(plain / "train", tmp_path / "coco" / name)
    data = open_data(tmp_path / "coco", "train")
    assert data.image(0).shape == (3, 30, 40)
    assert data.images[0].file == tmp_path / "coco" / name / "1.png"


@pytest.mark.parametrize(("name", "split"), [("valid", "val"), ("val", "val"), ("train", "train")])
def test_annotations_among_the_images_are_recognized(tmp_path: Path, plain: Path, name: str, split: str) -> None:
    shutil.copytree(plain / "train", tmp_path / "export" / name)
    shutil.copy(plain / "instances_train.json", tmp_path / "export" / name / "_annotations.coco.json")
    assert open_data(str(tmp_path / "export"), split).image(0).shape == (3, 30, 40)


def test_a_json_file_finds_the_images_of_its_layout(plain: Path) -> None:
    assert open_data(plain / "instances_train.json", "any").image(0).shape == (3, 30, 40)


def test_a_json_file_finds_images_where_it_is_told(tmp_path: Path, plain: Path) -> None:
    file = shutil.copy(plain / "instances_train.json", tmp_path / "labels.json")
    assert open_data(file, "train", images=plain / "train").image(0).shape == (3, 30, 40)


def test_a_json_file_without_an_image_folder_looks_beside_itself(tmp_path: Path, plain: Path) -> None:
    file = shutil.copy(plain / "instances_train.json", tmp_path / "labels.json")
    with pytest.raises(DataError, match=r"image 1 \(1.png\): there is no file .*1.png"):
        open_data(file, "train")
    shutil.copy(plain / "train" / "1.png", tmp_path)
    assert open_data(file, "train").image(0).shape == (3, 30, 40)


@pytest.mark.parametrize("name", ["shapes", "shapes:"])
def test_shapes_are_generated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    data = open_data(name, "val")
    assert isinstance(data, ShapesDataset)
    assert len(data) == 200


@pytest.mark.parametrize("name", ["shapes", "./shapes", Path("shapes")])
def test_a_folder_named_shapes_is_used(
    plain: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str | Path
) -> None:
    monkeypatch.chdir(plain.parent)
    plain.rename("shapes")
    assert isinstance(open_data(name, "train"), CocoDataset)
    assert isinstance(open_data("shapes:", "train"), ShapesDataset)
    messages = [record.message for record in caplog.records]
    assert messages == ([f"note: reading {Path.cwd() / 'shapes'}; for generated data give shapes:"] if name == "shapes" else [])


@pytest.mark.parametrize("name", ["./shapes", Path("shapes")])
def test_a_path_to_a_folder_named_shapes_never_means_generated_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str | Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="there is no file or folder shapes"):
        open_data(name, "train")


def test_an_unknown_layout_is_explained(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match=r"Looked for .*The folder contains: notes.txt, pictures/\.$"):
        open_data(tmp_path, "val")


def test_a_missing_split_names_what_is_there(plain: Path) -> None:
    with pytest.raises(
        DataError, match=r"does not contain annotations of 'val'.*The folder contains: instances_train.json, train/"
    ):
        open_data(plain, "val")


def test_a_missing_folder_is_an_error() -> None:
    with pytest.raises(DataError, match="there is no file or folder nowhere"):
        open_data("nowhere", "train")


def test_several_files_for_a_split_are_not_guessed_between(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    for year in (2014, 2017):
        (tmp_path / "annotations" / f"instances_train{year}.json").write_text(json.dumps(coco([])))
    with pytest.raises(DataError, match=r"instances_train2014.json, instances_train2017.json"):
        open_data(tmp_path, "train")


def test_annotations_without_their_image_folder_are_an_error(plain: Path) -> None:
    shutil.rmtree(plain / "train")
    with pytest.raises(DataError, match=r"there is no folder .*train with the images"):
        open_data(plain, "train")


def test_images_go_with_a_json_file_only(plain: Path) -> None:
    with pytest.raises(DataError, match="--images cannot be combined with a folder"):
        open_data(plain, "train", images=plain / "train")
