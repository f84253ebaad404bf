"""A checkpoint says everything about itself, and what is none is refused with one clear line."""

import json
import pickle
import stat
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import SMALLEST, TINY, batch, shapes

from maskset.checkpoint import find, load, read_metadata, save, write_tensors
from maskset.errors import CheckpointError
from maskset.instances import Category
from maskset.recipe import Recipe
from maskset.systems import build

CATEGORIES = (Category("cat", 7), Category("dög", 0), Category("a, b", 90))
SMALL = replace(TINY["solq"], backbone=SMALLEST)


def model(**changes):
    torch.manual_seed(0)
    return build(replace(SMALL, **changes), CATEGORIES)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    save(model(), Recipe(model=SMALL), path)
    return path


def test_a_loaded_model_is_the_saved_one(tmp_path):
    saved = model(num_queries=5)
    save(saved, Recipe(model=SMALL), tmp_path / "model.safetensors")  # the recipe's model may be older than the model
    loaded = load(tmp_path / "model.safetensors")
    assert loaded.config == saved.config
    assert loaded.categories == CATEGORIES
    assert not loaded.training
    images, _ = batch(shapes(1), SMALL)
    for actual, expected in zip(loaded(images).layers, saved.eval()(images).layers, strict=True):
        assert torch.equal(actual.class_logits, expected.class_logits)
        assert torch.equal(actual.mask_params, expected.mask_params)


def test_a_fitted_codec_is_saved(tmp_path):
    saved = model(codec="pca", code_length=4)
    saved.prepare(objects for _, objects in shapes(8))
    save(saved, Recipe(model=SMALL), tmp_path / "model.safetensors")
    masks = torch.rand(2, 32, 32)
    assert torch.equal(load(tmp_path / "model.safetensors").codec.encode(masks), saved.codec.encode(masks))


def test_the_metadata_tells_where_the_weights_come_from(tmp_path):
    recipe = Recipe(model=SMALL)
    save(model(), recipe, tmp_path / "a.safetensors", source="sha256 abc", license="CC-BY-4.0")
    metadata = read_metadata(tmp_path / "a.safetensors")
    assert (metadata.recipe, metadata.categories) == (recipe, CATEGORIES)
    assert (metadata.source, metadata.license) == ("sha256 abc", "CC-BY-4.0")


def test_without_a_word_on_it_the_source_is_unknown(file):
    assert (read_metadata(file).source, read_metadata(file).license) == (None, "unknown")


def test_saving_leaves_one_file_that_others_may_read(file):
    assert [path.name for path in file.parent.iterdir()] == ["model.safetensors"]
    plain = file.parent / "plain"
    plain.touch()
    assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_a_write_that_fails_leaves_the_old_file(file, monkeypatch):
    before = file.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save(model(num_queries=3), Recipe(model=SMALL), file)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == ["model.safetensors"]


def test_a_run_folder_means_its_best_weights_else_its_last(file):
    folder = file.parent
    file.rename(folder / "last.safetensors")
    assert find(folder).name == "last.safetensors"
    save(model(), Recipe(model=SMALL), folder / "best.safetensors")
    assert find(str(folder)).name == "best.safetensors"


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"does not contain best\.safetensors or last\.safetensors"):
        load(tmp_path)


def test_a_mistyped_path_is_an_error_that_names_the_near_one_and_no_download(file, monkeypatch):
    monkeypatch.setattr("maskset.checkpoint._download", lambda name: pytest.fail(f"downloads {name}"))
    with pytest.raises(CheckpointError, match=r"no checkpoint .*modle\.safetensors\. Did you mean .*model\.safetensors\?"):
        load(file.with_name("modle.safetensors"))
    with pytest.raises(CheckpointError, match="For a model on the hub write hub:owner/name"):
        load("owner/name")


@pytest.mark.parametrize("source", [None, 5, ["run"]])
def test_what_is_not_a_path_is_refused_with_what_is_allowed(source):
    with pytest.raises(CheckpointError, match="named by a run folder, a .safetensors file or .hub:owner/name., got"):
        find.__wrapped__(source)  # without the shape checks of the tests, which refuse it as well


def test_the_name_of_a_recipe_is_recognized():
    with pytest.raises(CheckpointError, match=r"no checkpoint solq-tiny\. It is a recipe: train it with 'maskset train solq"):
        load("solq-tiny")


def test_a_hub_that_cannot_be_reached_is_one_clear_line(tmp_path, monkeypatch):
    import huggingface_hub

    def unreachable(*_):
        raise ConnectionError("Name or service\nnot known")

    monkeypatch.setattr(huggingface_hub.HfApi, "file_exists", unreachable)
    with pytest.raises(
        CheckpointError, match=r"hub:nobody/nothing is not in the cache.*cannot be reached \(Name or service not known\)"
    ):
        load("hub:nobody/nothing")


@pytest.mark.parametrize("name", ["", "one", "a/b/c", "a b/c"])
def test_a_hub_name_has_an_owner_and_a_name(name, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.HfApi, "file_exists", lambda *_: pytest.fail("asks the hub"))
    with pytest.raises(CheckpointError, match="hub:owner/name"):
        load(f"hub:{name}")


def test_a_cached_model_of_the_hub_loads_without_a_network(file, monkeypatch):
    import huggingface_hub

    def unreachable(*_):
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub.HfApi, "file_exists", unreachable)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: str(file))
    assert load("hub:owner/name").categories == CATEGORIES


@pytest.mark.parametrize("length", [0, 3, 8, 100, -1])
def test_a_file_cut_short_is_refused(file, length):
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a safetensors file, or is damaged or cut short"):
        load(file)


class Trap:
    """What runs code when it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("unpickled",)


@pytest.mark.parametrize("name", ["official.pth", "posing.safetensors"])
@pytest.mark.parametrize("write", [pickle.dump, torch.save], ids=["pickle", "torch"])
def test_a_pickle_is_never_loaded_whatever_it_is_called(tmp_path, name, write):
    with (tmp_path / name).open("wb") as file:
        write({"model": Trap()}, file)
    with pytest.raises(CheckpointError, match="could run code and is never loaded.*maskset convert SYSTEM"):
        load(tmp_path / name)


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("hello " * 100)
    with pytest.raises(CheckpointError, match=r"notes\.txt is not a safetensors file"):
        load(tmp_path / "notes.txt")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_tensors_of_other_programs_are_refused(tmp_path, metadata):
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors", metadata)
    with pytest.raises(CheckpointError, match="is not a maskset checkpoint"):
        load(tmp_path / "other.safetensors")


def rewritten(file, **changes):
    """Write the checkpoint again with other metadata; None leaves an entry out."""
    with safe_open(file, "pt") as old:
        metadata = {key: value for key, value in {**old.metadata(), **changes}.items() if value is not None}
        save_file({name: old.get_tensor(name) for name in old.keys()}, file, metadata)  # noqa: SIM118


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "maskset 3"}, "written by a newer maskset"),
        ({"format": "maskset 1"}, "written before the first release"),
        ({"recipe": None}, "is damaged"),
        ({"recipe": "{"}, "is damaged"),
        ({"recipe": json.dumps({"model": {"system": "solq", "num_querys": 3}})}, "did you mean 'num_queries'"),
        ({"categories": "[{}]"}, "is damaged"),
        ({"categories": "[]"}, "names 0 categories but has 3 class channels"),
    ],
)
def test_metadata_that_make_no_sense_are_refused(file, changes, message):
    rewritten(file, **changes)
    with pytest.raises(CheckpointError, match=message):
        load(file)


def test_weights_that_do_not_fit_their_own_description_are_refused(file):
    settings = json.loads(json_of(file))
    settings["model"] |= {"num_queries": 99}
    rewritten(file, recipe=json.dumps(settings))
    with pytest.raises(CheckpointError, match="do not fit the model that the file describes.*size mismatch"):
        load(file)


def json_of(file):
    with safe_open(file, "pt") as opened:
        return opened.metadata()["recipe"]


def test_loading_asks_for_no_pretrained_weights(file, monkeypatch):
    settings = json.loads(json_of(file))
    settings["model"]["backbone"]["pretrained"] = True
    rewritten(file, recipe=json.dumps(settings))
    monkeypatch.setattr("maskset.conversion.backbones.load_pretrained", lambda *_: pytest.fail("downloads"))
    assert load(file).config.backbone.pretrained


def test_equal_models_give_equal_files(file, tmp_path):
    for name in ("a.safetensors", "b.safetensors", "c.safetensors"):
        save(model(), Recipe(model=SMALL), tmp_path / name, source="here", license="MIT")
    assert len({(tmp_path / name).read_bytes() for name in ("a.safetensors", "b.safetensors", "c.safetensors")}) == 1


def test_tensors_of_every_type_and_shape_come_back(tmp_path):
    types = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8)
    tensors = {str(dtype): torch.arange(6).to(dtype).reshape(2, 3) for dtype in (*types, torch.uint8, torch.bool)}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "strided": torch.arange(6.0).reshape(2, 3).T}
    write_tensors(tensors, tmp_path / "all.safetensors", {"ä": "ö"})
    read = load_file(tmp_path / "all.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors)


def test_a_disk_that_is_full_is_an_error_that_names_the_file(tmp_path):
    resource = pytest.importorskip("resource")  # not on Windows
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # a file cannot grow further, as on a full disk
        with pytest.raises(OSError, match=r"big\.safetensors"):
            write_tensors({"a": torch.zeros(10000)}, tmp_path / "big.safetensors", {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_weights_of_another_kind_of_number_are_refused_by_name(file, dtype):
    with_weights(file, lambda tensor: tensor.to(dtype))
    with pytest.raises(CheckpointError, match=rf"class_heads\.0\.weight is {dtype}, it must be torch.float32"):
        load(file)


def test_weights_of_half_precision_are_read(file):
    with_weights(file, torch.Tensor.half)
    assert load(file).get_parameter("class_heads.0.weight").dtype == torch.float32


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused_by_name(file, value):
    with_weights(file, lambda tensor: torch.full_like(tensor, value))
    with pytest.raises(CheckpointError, match=r"class_heads\.0\.weight has NaN or infinite values"):
        load(file)


def with_weights(file, change):
    """Write the checkpoint again with other weights of the class head."""
    with safe_open(file, "pt") as old:
        metadata, tensors = old.metadata(), {name: old.get_tensor(name) for name in old.keys()}  # noqa: SIM118
    save_file(tensors | {"class_heads.0.weight": change(tensors["class_heads.0.weight"])}, file, metadata)
