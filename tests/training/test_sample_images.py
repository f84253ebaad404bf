"""Pictures drawn while training."""

import numpy as np
import pytest
from fakes import Listed, Oracle, discs, make_instances
from PIL import Image

from maskset.errors import DataError
from maskset.instances import Category
from maskset.training.sample_images import draw_samples

CATEGORIES = (Category("disc", 1),)


def listed():
    scenes = [make_instances([0], discs([(16, 16, 4 + i)], (32, 32)), [0.9], CATEGORIES) for i in range(4)]
    return Listed(scenes), Oracle(scenes)


def test_a_broken_image_is_left_out_where_broken_ones_are_skipped(tmp_path):
    data, model = listed()
    draw_samples(model, data, tmp_path / "a.jpg")
    data.broken, data.skip_broken = {1}, True
    draw_samples(model, data, tmp_path / "b.jpg")
    whole, rest = (np.array(Image.open(tmp_path / name)).shape for name in ("a.jpg", "b.jpg"))
    assert rest == (whole[0], whole[1] * 3 // 4, 3)
    data.skip_broken = False
    with pytest.raises(DataError, match=r"1\.png"):
        draw_samples(model, data, tmp_path / "c.jpg")


def test_a_sheet_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    data, model = listed()
    draw_samples(model, data, tmp_path / "a.jpg")
    before = (tmp_path / "a.jpg").read_bytes()
    monkeypatch.setattr(Image.Image, "save", lambda _, path, *__, **___: path.write_text("half") / 0)
    with pytest.raises(ZeroDivisionError):
        draw_samples(model, data, tmp_path / "a.jpg")
    assert (tmp_path / "a.jpg").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.jpg"]


def test_nothing_is_drawn_where_no_image_can_be_read(tmp_path):
    data, model = listed()
    data.broken, data.skip_broken = {0, 1, 2, 3}, True
    draw_samples(model, data, tmp_path / "a.jpg")
    assert not (tmp_path / "a.jpg").exists()
