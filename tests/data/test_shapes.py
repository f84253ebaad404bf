"""Generated shapes: the same everywhere, masks that are what can be seen, and a data set on disk that reads back equal."""

import hashlib
from pathlib import Path

import pytest
import torch

from maskset.data import ShapesDataset, open_data
from maskset.data.shapes import write
from maskset.errors import DataError


def digest(pixels: torch.Tensor) -> str:
    return hashlib.sha256(pixels.permute(1, 2, 0).contiguous().numpy().tobytes()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("split", "index", "size", "expected"),
    [
        ("train", 0, (128, 128), "c245334e035113f8"),
        ("train", 1999, (128, 128), "e3f0c87a5c705a23"),
        ("val", 7, (96, 160), "667fc70b8aa10c56"),
    ],
)
def test_pixels_are_the_same_on_every_machine(split: str, index: int, size: tuple[int, int], expected: str) -> None:
    assert digest(ShapesDataset(split, size=size).image(index)) == expected


def test_an_image_depends_on_its_number_alone() -> None:
    data = ShapesDataset("val", size=(32, 32))
    alone = data.read(5)
    for i in range(5):
        data.read(i)
    again = ShapesDataset("val", 6, size=(32, 32)).read(5)
    assert torch.equal(alone[0], again[0])
    assert alone[1].masks == again[1].masks == data.targets(5).masks


def test_splits_and_seeds_show_other_scenes() -> None:
    pictures = [ShapesDataset(split, 1, (32, 32), seed).image(0) for split in ("train", "val") for seed in (0, 1)]
    assert len({digest(pixels) for pixels in pictures}) == 4


@pytest.mark.parametrize("size", [(16, 16), (17, 90), (128, 96), (256, 256)])
def test_scenes_have_1_to_5_objects_at_any_size(size: tuple[int, int]) -> None:
    data = ShapesDataset("train", 12, size)
    for i, count in enumerate(data.counts()):
        pixels, objects = data.read(i)
        assert pixels.shape == (3, *size)
        assert pixels.dtype == torch.uint8
        assert len(objects) == count
        assert 1 <= count <= 5
    assert len(set(data.counts().tolist())) > 2


def test_masks_are_the_parts_that_can_be_seen() -> None:
    data = ShapesDataset("train", 40)
    for i in range(0, 40, 4):
        objects = data.targets(i)
        masks = objects.masks.dense()
        assert int(masks.sum(0).max()) == 1
        assert torch.equal(objects.boxes, objects.masks.boxes())
        assert torch.equal(data.areas(i), masks.sum((1, 2)).double())
        assert int(masks.sum((1, 2)).min()) > 90
        assert len(data.crowds(i)) == 0


def test_every_class_is_common_and_no_class_has_a_color_of_its_own() -> None:
    data, colors = ShapesDataset("train", 200, size=(32, 32)), {0: [], 1: [], 2: []}
    for i in range(len(data)):
        pixels, objects = data.read(i)
        for label, mask in zip(objects.labels.tolist(), objects.masks.dense(), strict=True):
            colors[label].append(pixels[:, mask].float().mean(1))
    means = torch.stack([torch.stack(samples).mean(0) for samples in colors.values()])
    assert min(len(samples) for samples in colors.values()) > 120
    assert (means.amax(0) - means.amin(0)).max() < 20


def test_unknown_splits_and_sizes_are_refused() -> None:
    with pytest.raises(DataError, match="no split 'dev', only train, val, test"):
        ShapesDataset("dev")
    with pytest.raises(DataError, match="16 or more pixels"):
        ShapesDataset("train", size=(8, 64))
    with pytest.raises(IndexError):
        ShapesDataset("train", 3).read(3)


def test_a_written_data_set_reads_back_equal(tmp_path: Path) -> None:
    folder = write(tmp_path / "shapes", {"train": 4, "val": 2}, size=(48, 64), seed=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shapes"]
    for split, count in (("train", 4), ("val", 2)):
        made, got = ShapesDataset(split, count, (48, 64), seed=3), open_data(folder, split)
        assert got.categories == made.categories
        assert len(got) == count
        for i in range(count):
            (pixels, objects), (read_pixels, read_objects) = made.read(i), got.read(i)
            assert torch.equal(pixels, read_pixels)
            assert objects.masks == read_objects.masks
            assert torch.equal(objects.labels, read_objects.labels)
            assert torch.equal(objects.boxes, read_objects.boxes)


def test_an_existing_folder_is_not_touched(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="exists already"):
        write(tmp_path)


def test_an_interrupted_write_leaves_no_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self, index):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ShapesDataset, "read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "shapes", {"train": 1})
    assert not (tmp_path / "shapes").exists()
    assert len(open_data(write(tmp_path / "shapes", {"train": 1}), "train")) == 1
