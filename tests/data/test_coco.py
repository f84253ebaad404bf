"""COCO files: what is read is what they say, and nothing broken gets through."""

import contextlib
import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_files import SIZE, TRIANGLE, annotation, coco, image, write
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from maskset.data import CocoDataset, open_data
from maskset.errors import DataError

SAMPLE = Path(__file__).parents[1] / "sample" / "nuclei"  # real images, see its README
NAN, INFINITY = float("nan"), float("inf")


def opened(folder: Path, content: Any, **options: Any) -> CocoDataset:
    data = open_data(write(folder, content), "train", **options)
    assert isinstance(data, CocoDataset)
    return data


def runs(counts: list[int]) -> dict[str, Any]:
    return {"size": list(SIZE), "counts": counts}


def compressed(counts: list[int]) -> dict[str, Any]:
    packed = coco_mask.frPyObjects(runs(counts), *SIZE)
    return {"size": list(SIZE), "counts": packed["counts"].decode()}


def test_categories_are_in_the_order_of_their_ids(tmp_path: Path) -> None:
    data = opened(tmp_path, coco([annotation(category=7), annotation(2, category=0)]))
    assert [(category.name, category.coco_id) for category in data.categories] == [("dog", 0), ("cat", 7)]
    assert data.targets(0).labels.tolist() == [1, 0]
    assert data.targets(0).names == ["cat", "dog"]


def test_category_names_that_occur_twice_are_told_apart(tmp_path: Path) -> None:
    content = coco([]) | {"categories": [{"id": 0, "name": "fish"}, {"id": 1, "name": "fish"}]}
    assert [category.name for category in opened(tmp_path, content).categories] == ["fish (id 0)", "fish (id 1)"]


def test_polygons_and_both_kinds_of_run_lengths_give_pycocotools_masks(tmp_path: Path) -> None:
    counts = [100, 50, 900, 150]
    kinds = [TRIANGLE, [*TRIANGLE, [25, 5, 35, 5, 30, 15.5]], runs(counts), compressed(counts)]
    data = opened(tmp_path, coco([annotation(i, segmentation=kind) for i, kind in enumerate(kinds)]))
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO(data.file)
    expected = np.stack([reference.annToMask(row) for row in reference.dataset["annotations"]])
    np.testing.assert_array_equal(data.targets(0).masks.dense().numpy(), expected)


def test_crowds_are_kept_apart(tmp_path: Path) -> None:
    crowd = annotation(2, iscrowd=1, segmentation=runs([0, 1200]), bbox=[0, 0, 40, 30])
    data = opened(tmp_path, coco([annotation(1), crowd, annotation(3)]))
    assert len(data.targets(0)) == 2
    assert data.crowds(0).masks.areas().tolist() == [1200]
    assert data.counts().tolist() == [2]


def test_annotations_stay_with_their_image_in_any_order(tmp_path: Path) -> None:
    rows = [annotation(1, image=2, category=0), annotation(2, image=9), annotation(3, image=2)]
    data = opened(tmp_path, coco(rows, [image(9), image(5), image(2)]))
    assert [data.targets(i).names for i in range(3)] == [["cat"], [], ["dog", "cat"]]
    assert data.counts().tolist() == [1, 0, 2]


def test_an_image_without_annotations_is_kept(tmp_path: Path) -> None:
    pixels, objects = opened(tmp_path, coco([])).read(0)
    assert pixels.shape == (3, *SIZE)
    assert objects.boxes.shape == (0, 4)
    assert objects.masks.size == SIZE


def test_boxes_are_cut_to_the_image(tmp_path: Path) -> None:
    data = opened(tmp_path, coco([annotation(1, bbox=[-5, 3, 20, 100]), annotation(2, bbox=[10.5, 2.25, 3, 4])]))
    assert data.targets(0).boxes.tolist() == [[0, 3, 15, 30], [10.5, 2.25, 13.5, 6.25]]


NO_BOXES = [
    [],
    [0, 0, 0, 0],
    [5, 5, 0, 7],
    [8, 8, -3, 4],
    [40, 0, 10, 10],
    [1, 2, 3],
    [1, 2, NAN, 4],
    [1, 2, "wide", 4],
    "box",
    7,
    {},
]


@pytest.mark.parametrize("kind", [TRIANGLE, runs([2 * 30 + 5, 10, 1125])])
def test_an_object_without_a_usable_box_has_the_box_of_its_mask(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: Any
) -> None:
    rows = [annotation(i, bbox=box, area=0, segmentation=kind) for i, box in enumerate(NO_BOXES)]
    data = opened(tmp_path, coco([*rows, annotation(99, segmentation=kind, bbox=None, area=0)]))
    objects = data.targets(0)
    assert len(objects) == len(NO_BOXES) + 1
    assert torch.equal(objects.boxes, objects.masks.boxes())
    assert data.areas(0).tolist() == objects.masks.areas().tolist()
    assert not data.skipped
    expected = (
        f"{len(NO_BOXES)} of {len(NO_BOXES) + 1} annotations have an empty or invalid bbox, so the box of their mask is used"
    )
    assert [record.message for record in caplog.records] == [f"warning: {note}" for note in data.notes]
    assert len(data.notes) == 1
    assert f"instances_train.json: {expected}. The first: annotation 0 (image 1, 1.png), []." in data.notes[0]


def test_an_annotation_without_box_and_mask_is_counted(tmp_path: Path) -> None:
    outside = [[60, 5, 70, 5, 70, 15]]
    rows = [
        annotation(1),
        annotation(2, bbox=[60, 5, 10, 10], segmentation=outside),
        annotation(3, bbox=None, segmentation=runs([1200])),
    ]
    data = opened(tmp_path, coco(rows))
    assert len(data.targets(0)) == 1
    assert "2 of 3 annotations have neither a box nor a mask inside the image, so they are left out." in data.notes[0]


def test_boxes_that_contradict_their_masks_are_counted_and_used(tmp_path: Path) -> None:
    block = [[20, 15, 30, 15, 30, 25, 20, 25]]
    rows = [annotation(i, bbox=[20, 15, 30, 25], segmentation=block) for i in range(3)]  # x0 y0 x1 y1
    rows += [annotation(5, segmentation=runs([20 * 30 + 15, 10] + [20, 10] * 9 + [305]), bbox=[1, 1, 5, 5])]
    rows += [annotation(6, segmentation=block, bbox=[20, 15, 10, 10]), annotation(7, segmentation=block, bbox=[19, 14, 12, 12])]
    data = opened(tmp_path, coco(rows))
    assert data.targets(0).boxes[0].tolist() == [20, 15, 40, 30]
    assert len(data.notes) == 1
    assert "4 of 6 annotations have a bbox (used as it is) that contradicts their mask; it should be x, y, width" in data.notes[0]


def test_sound_annotations_need_no_note(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sliver = annotation(3, segmentation=[[5, 5, 25, 5, 25, 6]], bbox=[5, 5, 20, 1])
    data = opened(tmp_path, coco([annotation(1), annotation(2, bbox=[0, 1, 22, 22]), sliver]))
    assert not data.notes
    assert not caplog.records


def as_text(value: Any) -> Any:
    """Return JSON content with text in place of every number."""
    if isinstance(value, dict):
        return {key: as_text(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [as_text(entry) for entry in value]
    return str(value) if isinstance(value, (int, float)) else value


def test_numbers_that_are_written_as_text_are_numbers(tmp_path: Path) -> None:
    rows = [annotation(1), annotation(2, iscrowd=1, segmentation=runs([100, 50, 1050])), annotation(3, area="-4.5", category=0)]
    content = coco([*rows, annotation(4, bbox=[1, 2, "20.0000", "20.0000"])], [image(1), image(12)])
    plain, text = opened(tmp_path / "a", content), opened(tmp_path / "b", as_text(content))
    for data in (plain, text):
        assert not data.notes
        assert not data.skipped
    assert [(record.id, record.height, record.width) for record in text.images] == [(1, 30, 40), (12, 30, 40)]
    assert text.categories == plain.categories
    for part in ("targets", "crowds"):
        first, second = getattr(plain, part)(0), getattr(text, part)(0)
        assert torch.equal(first.boxes, second.boxes)
        assert torch.equal(first.labels, second.labels)
        assert torch.equal(first.masks.dense(), second.masks.dense())
    assert torch.equal(plain.areas(0), text.areas(0))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no FIFOs here")
@pytest.mark.parametrize("skip", [False, True])
def test_a_fifo_in_place_of_an_image_is_refused(tmp_path: Path, skip: bool) -> None:
    data = opened(tmp_path, coco([annotation()]), skip_broken=skip)
    (tmp_path / "train" / "1.png").unlink()
    os.mkfifo(tmp_path / "train" / "1.png")
    with pytest.raises(DataError, match=r"1\.png .*regular file"):
        data.image(0)


def test_a_file_in_another_encoding_says_so(tmp_path: Path) -> None:
    write(tmp_path, coco([annotation()]))
    (tmp_path / "instances_train.json").write_bytes(json.dumps({"images": "\u7ec6\u80de"}, ensure_ascii=False).encode("gb18030"))
    with pytest.raises(DataError, match="instances_train.json is not UTF-8 text .*: save it as UTF-8"):
        open_data(tmp_path, "train")


def test_what_may_be_missing_is_made_from_the_mask(tmp_path: Path) -> None:
    kinds = [TRIANGLE, runs([2 * 30 + 5, 10, 1125])]
    rows = [annotation(i, segmentation=kind, bbox=None, area=None, iscrowd=None) for i, kind in enumerate(kinds)]
    data = opened(tmp_path, coco(rows))
    objects = data.targets(0)
    assert torch.equal(objects.boxes, objects.masks.boxes())
    assert objects.boxes[1].tolist() == [2, 5, 3, 15]
    assert data.areas(0).tolist() == objects.masks.areas().tolist()


def test_areas_are_the_annotated_ones(tmp_path: Path) -> None:
    rows = [annotation(1, area=12.5), annotation(2, iscrowd=1, area=7), annotation(3, area=99)]
    assert opened(tmp_path, coco(rows)).areas(0).tolist() == [12.5, 99]


def test_a_data_set_can_be_sent_to_another_process(tmp_path: Path) -> None:
    data = opened(tmp_path, coco([annotation(), annotation(2, segmentation=runs([7, 3, 1190]))]))
    assert pickle.loads(pickle.dumps(data)).targets(0).masks == data.targets(0).masks


BROKEN_ANNOTATIONS = {
    "category 999": (annotation(5, category=999), "there is no category 999, the file has 0, 7"),
    "no category": (annotation(5, category_id=None), "there is no category None"),
    "unknown image": (annotation(5, image=33), "there is no image 33"),
    "an image that is a list": (annotation(5, image_id=[1]), r"there is no image \[1\]"),
    "the same id twice": (annotation(1), "the id occurs twice"),
    "an area of text": (annotation(5, area="large"), "'area' must be a finite number"),
    "a far coordinate": (annotation(5, segmentation=[[1, 2, 1e9, 2, 21, 22]]), "coordinate is 1e.09, far outside"),
    "NaN": (annotation(5, segmentation=[[1, 2, NAN, 2, 21, 22]]), "not finite"),
    "infinity": (annotation(5, segmentation=[[1, 2, -INFINITY, 2, 21, 22]]), "not finite"),
    "a number beyond floats": (annotation(5, segmentation=[[1, 2, 10**400, 2, 21, 22]]), "not a list of numbers"),
    "text for numbers": (annotation(5, segmentation=[["a"] * 6]), "not a list of numbers"),
    "two points": (annotation(5, segmentation=[[1, 2, 3, 4]]), "three or more"),
    "an endless outline": (annotation(5, segmentation=[[-180, -180, 180, 180] * 8000]), "outline is longer than"),
    "an odd count": (annotation(5, segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "a flat list"),
    "no polygons": (annotation(5, segmentation=[]), "empty"),
    "no segmentation": (annotation(5, segmentation=None), "list of polygons or a dict"),
    "runs that overrun": (annotation(5, segmentation=runs([100, 50, 9000])), "sum to 9150, but .* 1200 pixels"),
    "text runs that overrun": (annotation(5, segmentation={"size": list(SIZE), "counts": "oo0"}), "sum to"),
    "damaged text": (annotation(5, segmentation={"size": list(SIZE), "counts": "~~"}), "characters outside"),
    "a negative run": (annotation(5, segmentation=runs([1300, -100])), "negative"),
    "runs of another size": (annotation(5, segmentation={"size": [40, 30], "counts": [1200]}), "for size .40, 30."),
    "a size that is none": (annotation(5, segmentation={"size": 5, "counts": [1200]}), "for size 5"),
    "an infinite area": (annotation(5, area=INFINITY), "'area' must be a finite number"),
    "half a crowd": (annotation(5, iscrowd=0.5), "'iscrowd' must be 0 or 1"),
}


@pytest.mark.parametrize("kind", BROKEN_ANNOTATIONS)
def test_a_broken_annotation_is_named_or_skipped(tmp_path: Path, kind: str) -> None:
    row, message = BROKEN_ANNOTATIONS[kind]
    content = coco([annotation(1), row])
    with pytest.raises(DataError, match=rf"instances_train.json: annotation {row['id']}.*{message}.*--skip-broken"):
        opened(tmp_path, content)
    data = opened(tmp_path, content, skip_broken=True)
    assert len(data.targets(0)) == 1
    assert len(data.skipped) == 1


BROKEN_IMAGES = {
    "a path upwards": (image(2, file_name="../../secret.png"), "inside the image folder"),
    "a Windows path upwards": (image(2, file_name="a\\..\\..\\secret.png"), "inside the image folder"),
    "an absolute path": (image(2, file_name="/etc/passwd"), "inside the image folder"),
    "a drive": (image(2, file_name="C:secret.png"), "inside the image folder"),
    "no name": (image(2, file_name=None), "needs 'file_name'"),
    "an impossible name": (image(2, file_name="a\0b"), "needs 'file_name'"),
    "a missing file": (image(2, file_name="sub/2.png"), "there is no file"),
    "the same id twice": (image(1), "the id occurs twice"),
    "an id of text": (image("second"), "must be a whole number"),  # type: ignore[arg-type]
    "no height": (image(2, height=None), "'height' and 'width'"),
    "a width of nothing": (image(2, width=0), "'height' and 'width'"),
    "an infinite width": (image(2, width=INFINITY), "'height' and 'width'"),
    "too many pixels": (image(2, width=30000, height=30000), "too large"),
    "too long a side": (image(2, width=10**6, height=1), "too large"),
}


@pytest.mark.parametrize("kind", BROKEN_IMAGES)
def test_a_broken_image_entry_is_named_or_skipped(tmp_path: Path, kind: str) -> None:
    row, message = BROKEN_IMAGES[kind]
    content = coco([annotation(1)], [image(1), row])
    with pytest.raises(DataError, match=rf"instances_train.json: image {row['id']}.*{message}"):
        opened(tmp_path, content)
    data = opened(tmp_path, content, skip_broken=True)
    assert [record.id for record in data.images] == [1]
    assert len(data.skipped) == 1


def test_annotations_of_a_skipped_image_go_with_it(tmp_path: Path) -> None:
    content = coco([annotation(1), annotation(2, image=2)], [image(1), image(2, height=0)])
    data = opened(tmp_path, content, skip_broken=True)
    assert len(data.skipped) == 1
    assert data.counts().tolist() == [1]


def test_the_first_of_several_problems_is_told_with_their_number(tmp_path: Path) -> None:
    rows = [annotation(i, category=999) for i in range(5)]
    with pytest.raises(DataError, match=r"annotation 0 .*It has 5 such problems"):
        opened(tmp_path, coco(rows))


def test_a_file_with_no_usable_image_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no usable image"):
        opened(tmp_path, coco([], [image(height=0)]), skip_broken=True)


WHOLE = json.dumps(coco([annotation()]))
BROKEN_FILES = {
    "cut in half": (WHOLE[: len(WHOLE) // 2], "cannot be read as JSON"),
    "empty": ("", "cannot be read as JSON"),
    "too deep": ("[" * 100_000, "cannot be read as JSON"),
    "a list": ("[]", "needs 'images'"),
    "a number": ("1", "needs 'images'"),
    "no annotations": (json.dumps({"images": []}), "needs 'annotations'"),
    "images that are numbers": (json.dumps({"images": [1], "annotations": []}), "needs 'images'"),
    "no category": (json.dumps(coco([]) | {"categories": []}), "no categories"),
    "a nameless category": (json.dumps(coco([]) | {"categories": [{"id": 1}]}), "a category needs"),
    "a category twice": (json.dumps(coco([]) | {"categories": [{"id": 1, "name": "a"}] * 2}), "a category id occurs twice"),
}


@pytest.mark.parametrize("kind", BROKEN_FILES)
def test_a_broken_file_is_named(tmp_path: Path, kind: str) -> None:
    text, message = BROKEN_FILES[kind]
    with pytest.raises(DataError, match=f"instances_train.json.*{message}"):
        opened(tmp_path, text, skip_broken=True)


def test_an_image_of_another_size_is_named(tmp_path: Path) -> None:
    data = opened(tmp_path, coco([], [image(height=60)]))
    with pytest.raises(DataError, match=r"1.png is 40 x 30 pixels .* are for 40 x 60"):
        data.read(0)


def test_the_id_of_an_annotation_may_be_a_whole_float_or_text(tmp_path: Path) -> None:
    ids = [1.0, "2", "a3"]
    data = opened(tmp_path, coco([annotation() | {"id": id} for id in ids]))
    assert len(data.targets(0)) == 3
    with pytest.raises(DataError, match="the id occurs twice"):
        opened(tmp_path, coco([annotation() | {"id": id} for id in (1, 1.0)]))
    with pytest.raises(DataError, match="the id must be a whole number or text"):
        opened(tmp_path, coco([annotation() | {"id": 1.5}]))


def test_a_truncated_image_is_named(tmp_path: Path) -> None:
    data = opened(tmp_path, coco([annotation()]))
    file = tmp_path / "train" / "1.png"
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(DataError, match=r"1.png cannot be read .*leave out broken parts with --skip-broken \(in training"):
        data.read(0)
    assert len(data.targets(0)) == 1
    data = open_data(tmp_path, "train", skip_broken=True)
    with pytest.raises(DataError, match=r"1.png cannot be read as an image") as raised:
        data.read(0)
    assert "--skip-broken" not in str(raised.value)  # it is given, so that this will be caught and counted


def test_real_masks_are_pycocotools_masks_to_the_pixel() -> None:
    data = open_data(SAMPLE, "val")
    assert isinstance(data, CocoDataset)
    assert not data.notes
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO(data.file)
    for i in range(len(data)):
        pixels, objects = data.read(i)
        assert pixels.shape[1:] == objects.masks.size
        rows = reference.imgToAnns[data.images[i].id]
        assert [data.categories[label].coco_id for label in objects.labels] == [row["category_id"] for row in rows]
        for row, mask in zip(rows, objects.masks.dense().numpy(), strict=True):
            np.testing.assert_array_equal(mask, reference.annToMask(row))
