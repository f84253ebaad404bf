"""Fitting and comparing codecs on small data sets in COCO's format; the numbers on real masks are in the docs."""

import json
import math

import numpy as np
import pytest
import torch
from fakes import Listed, discs, make_instances
from PIL import Image

from maskset.checkpoint import load
from maskset.codec_tools.compare import CodecSpec, _mask_iou, _mean, _scores, compare_codecs, reconstruct
from maskset.codec_tools.fit import fit_codec, sample_crops
from maskset.data import open_data
from maskset.errors import CheckpointError, ConfigError, DataError
from maskset.instances import Category, Instances, Masks
from maskset.masks.codecs import files as codec_files
from maskset.masks.codecs import sparse
from maskset.masks.codecs.dct import DctCodec
from maskset.masks.codecs.pca import PcaCodec
from maskset.masks.codecs.sparse import SparseCodec

CLASSES = (Category("disc", 5), Category("ring", 9))


def scene(seed: int, count: int) -> Instances:
    """Return discs and rings at random places, small to large."""
    rng = np.random.default_rng(seed)
    places = [(rng.uniform(20, 130), rng.uniform(20, 100), rng.uniform(5, 40)) for _ in range(count)]
    outer, inner = discs(places, (120, 150)), discs([(x, y, r / 2) for x, y, r in places], (120, 150))
    labels = rng.integers(0, 2, count)
    return make_instances(labels.tolist(), outer & ~(inner & (labels == 1)[:, None, None]), None, CLASSES)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return a folder with a train split of 90 objects and a val split of 20, one of its images empty."""
    folder = tmp_path_factory.mktemp("discs")
    for split, counts in (("train", [30, 30, 30]), ("val", [12, 0, 8])):
        (folder / split).mkdir()
        images = [{"id": i, "file_name": f"{i}.png", "height": 120, "width": 150} for i in range(len(counts))]
        for image in images:
            Image.new("L", (150, 120)).save(folder / split / image["file_name"])
        rows = [row for i, count in enumerate(counts) for row in scene(100 * len(split) + i, count).to_coco(i)]
        annotations = [{**row, "id": number} for number, row in enumerate(rows, 1)]
        categories = [{"id": category.coco_id, "name": category.name} for category in CLASSES]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / f"instances_{split}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def comparison(data):
    specs = [CodecSpec("dct", 64, 256), CodecSpec("flatten", 28, 784), CodecSpec("pca", 28, 8), CodecSpec("sparse", 14, 40)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "LEARNING_STEPS", 5)
        return compare_codecs([data], codecs=specs, progress=False)


def test_every_codec_is_measured_on_every_object(comparison):
    assert [str(score.codec) for score in comparison.scores] == [
        "dct 64 x 64",
        "flatten 28 x 28",
        "pca 28 x 28",
        "sparse 14 x 14",
    ]
    assert all(score.objects == 20 and 0.5 < score.iou <= 1 and 0.3 < score.mask_ap <= 1 for score in comparison.scores)


def test_a_shorter_code_of_the_same_masks_is_worse(comparison):
    _, flatten, pca, _ = comparison.scores
    assert flatten.iou > pca.iou
    assert flatten.mask_ap > pca.mask_ap


def test_the_table_states_the_codecs_and_its_limits(comparison):
    text = str(comparison)
    assert all(word in text for word in ("dct 64 x 64", "784", "mask AP", "Upper bounds", "DCT, PCA, flatten, sparse"))
    assert f"{comparison.scores[0].iou:.3f}" in text
    assert max(map(len, text.splitlines())) <= 130


def test_the_json_holds_the_numbers_and_null_for_what_could_not_be_measured(comparison, tmp_path):
    content = json.loads(comparison.save(tmp_path / "codes.json").read_text())
    assert content["scores"][0]["iou"] == comparison.scores[0].iou
    assert content["scores"][0]["codec"] == {"kind": "dct", "size": 64, "length": 256}
    assert math.isnan(comparison.scores[0].iou_large)
    assert content["scores"][0]["iou_large"] is None


def test_an_exact_codec_has_ap_1_with_more_than_100_objects():
    # Discs of 16 pixels in boxes of 16 pixels: cropping and pasting move nothing.
    centers = [(16.0 * column + 8, 16.0 * row + 8, 8) for row in range(11) for column in range(11)]
    scenes = [make_instances([0] * 121, discs(centers, (176, 176)), None, CLASSES)]
    [score] = _scores("grid", Listed(scenes), {CodecSpec("dct", 16, 256): DctCodec(16, 256)}, False)
    assert (score.objects, score.iou, score.mask_ap, score.iou_small) == (121, 1, 1, 1)
    assert math.isnan(score.iou_medium)


def test_reconstruction_goes_through_the_annotated_box_not_the_tight_one():
    masks = Masks.from_dense(torch.from_numpy(discs([(20, 20, 6)], (40, 40))))
    half = torch.tensor([[20.0, 10.0, 30.0, 30.0]])
    assert reconstruct(DctCodec(64, 256), masks, half).boxes()[0, 0] == 20


def test_the_overlap_of_masks_without_pixels_is_skipped():
    masks = Masks.from_dense(torch.tensor([[[True, True]], [[False, False]], [[True, False]]]))
    other_masks = Masks.from_dense(torch.tensor([[[True, False]], [[False, False]], [[False, True]]]))
    overlaps = _mask_iou(masks, other_masks)
    assert overlaps[[0, 2]].tolist() == [0.5, 0]
    assert overlaps[1].isnan()
    assert _mean(overlaps) == 0.25


def test_a_fitted_codec_is_written_and_read_back(data, tmp_path, capsys):
    written = fit_codec("pca", data, tmp_path / "pca.safetensors", size=14, length=10)
    assert "reading" in capsys.readouterr().err
    codec = PcaCodec(14, 10)
    codec_files.load(codec, tmp_path / "pca.safetensors")
    assert torch.equal(codec.basis, written.basis)
    assert [path.name for path in tmp_path.iterdir()] == ["pca.safetensors"]


def test_a_sparse_codec_keeps_its_beta_in_the_file(data, tmp_path, monkeypatch):
    monkeypatch.setattr(sparse, "LEARNING_STEPS", 2)
    fit_codec("sparse", data, tmp_path / "sparse.safetensors", size=14, length=10, beta=0.5, progress=False)
    codec = SparseCodec(14, 10)
    codec_files.load(codec, tmp_path / "sparse.safetensors")
    assert float(codec.beta) == 0.5


def test_only_as_many_masks_as_are_used_are_read(data):
    parts = list(sample_crops(open_data(data, "train"), 14, 31, "reading", False))
    assert [len(part) for part in parts] == [30, 30]


def test_a_file_of_another_codec_is_refused(data, tmp_path):
    fit_codec("pca", data, tmp_path / "pca.safetensors", size=14, length=10, progress=False)
    with pytest.raises(ConfigError, match="another mask codec: kind pca instead of sparse, length 10 instead of 12"):
        codec_files.load(SparseCodec(14, 12), tmp_path / "pca.safetensors")
    with pytest.raises(CheckpointError, match="is not a maskset checkpoint"):
        load(tmp_path / "pca.safetensors")


def test_mistakes_are_told_before_anything_is_read(data, tmp_path):
    with pytest.raises(ConfigError, match="'dct' cannot be fitted, only pca, sparse, logit-pca, autoencoder"):
        fit_codec("dct", data, tmp_path / "x")
    with pytest.raises(ConfigError, match="only a sparse codec has a beta"):
        fit_codec("pca", data, tmp_path / "x", beta=0.1)
    with pytest.raises(ConfigError, match="cannot be written"):
        fit_codec("pca", data, tmp_path / "missing" / "x.safetensors")
    (tmp_path / "mine.safetensors").write_text("mine")
    with pytest.raises(ConfigError, match="mine.safetensors already exists: choose another name"):
        fit_codec("pca", data, tmp_path / "mine.safetensors")
    with pytest.raises(ConfigError, match=r"must end in \.safetensors"):
        fit_codec("pca", data, tmp_path / "x.pt")
    with pytest.raises(DataError, match="no file or folder"):
        compare_codecs([tmp_path / "missing"], progress=False)


def test_a_codec_with_more_numbers_than_masks_is_skipped_with_a_note(data, tmp_path):
    specs = [CodecSpec("pca", 14, 91), CodecSpec("dct", 64, 256), CodecSpec("sparse", 14, 91), CodecSpec("pca", 14, 10)]
    comparison = compare_codecs([data], codecs=specs, progress=False)
    assert [score.codec for score in comparison.scores] == [specs[1], specs[3]]
    assert comparison.scores[1].iou < comparison.scores[0].iou
    assert len(comparison.skipped) == 2
    notes = [line for line in str(comparison).splitlines() if line.startswith("Skipped: ")]
    assert f"pca 14 x 14 on {data.name}: a codec of 91 numbers cannot be fitted to 90 masks" in notes[0]
    assert "sparse 14 x 14" in notes[1]
    assert len(json.loads(comparison.save(tmp_path / "codes.json").read_text())["skipped"]) == 2


def test_too_few_masks_are_refused_and_leave_no_file(data, tmp_path):
    with pytest.raises(ConfigError, match="91 numbers cannot be fitted to 90 masks"):
        fit_codec("pca", data, tmp_path / "x.safetensors", size=14, length=91, progress=False)
    with pytest.raises(ConfigError, match="32 numbers cannot be fitted to 31 masks"):
        fit_codec("pca", data, tmp_path / "x.safetensors", size=14, length=32, max_masks=31, progress=False)
    assert not list(tmp_path.iterdir())


def test_one_path_is_one_data_set(data):
    for path in (data, str(data)):
        comparison = compare_codecs(path, codecs=[CodecSpec("dct", 16, 16)], progress=False)
        assert [score.data for score in comparison.scores] == [data.name]
    with pytest.raises(DataError, match="missing"):
        compare_codecs("missing", progress=False)
