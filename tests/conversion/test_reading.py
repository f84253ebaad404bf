"""Official files as people have them: wrapped, averaged, compiled, with settings beside the weights; and nothing is run."""

import argparse
import pickle
import sys
from collections import defaultdict
from itertools import accumulate
from pathlib import Path, PosixPath, WindowsPath
from types import ModuleType

import numpy as np
import pytest
import torch

from maskset.conversion import convert, convert_file
from maskset.conversion.reading import read_state_dict, read_weights
from maskset.errors import ConversionError

STATE = {"backbone.weight": torch.zeros(2), "head.bias": torch.zeros(3)}
AVERAGED = {name: torch.ones_like(value) for name, value in STATE.items()}


def prefixed(prefix: str, state=STATE):
    return {f"{prefix}{name}": value for name, value in state.items()}


def saved(path: Path, content) -> Path:
    torch.save(content, path / "official.pth")
    return path / "official.pth"


@pytest.mark.parametrize(
    ("content", "path", "unused"),
    [
        (STATE, "", ""),
        ({"model": STATE, "optimizer": {"state": {0: {"step": torch.zeros(1)}}}, "epoch": 3}, "model", "optimizer, epoch"),
        ({"model": STATE, "model_ema": AVERAGED}, "model_ema", "model"),
        ({"model": STATE, "ema": {"module": AVERAGED, "updates": 4}}, "ema.module", "model, ema.updates"),
        ({"model": STATE, "ema": None}, "model", "ema"),
        ({"model": "solq", "state_dict": STATE}, "state_dict", "model"),
        (STATE | {"version": 2}, "", "version"),
        ({"state_dict": STATE, "state_dict_ema": AVERAGED}, "state_dict_ema", "state_dict"),
        (prefixed("module."), "module", ""),
        (prefixed("module.") | {"n_averaged": torch.tensor(7)}, "module", "n_averaged"),
        (prefixed("_orig_mod."), "_orig_mod", ""),
        (prefixed("module._orig_mod."), "module._orig_mod", ""),
        ({"model": prefixed("_orig_mod.module.")}, "model._orig_mod.module", ""),
        ({"state_dict": prefixed("model.") | {"criterion.weights": torch.zeros(4)}}, "state_dict.model", "state_dict.criterion"),
        ({"state_dict": prefixed("model.") | prefixed("ema_model.module.", AVERAGED)}, "state_dict.ema_model.module",
         "state_dict.model"),
        ({"ema_state_dict": prefixed("module.", AVERAGED) | {"steps": torch.zeros(1)}, "state_dict": STATE},
         "ema_state_dict.module", "state_dict, ema_state_dict.steps"),
    ],
)  # fmt: skip
def test_weights_are_found_inside_what_wraps_them(tmp_path, content, path, unused):
    weights = read_weights(saved(tmp_path, content))
    assert weights.state.keys() == STATE.keys()
    assert (".".join(weights.path), ", ".join(weights.unused)) == (path, unused)
    averaged = "ema" in path
    assert all(bool((value == averaged).all()) for value in weights.state.values())


def test_averaged_weights_and_unused_entries_are_named(tmp_path):
    weights = read_weights(saved(tmp_path, {"model": STATE, "ema": {"module": AVERAGED}, "epoch": 3}))
    assert str(weights) == "averaged weights of 'ema.module' (not used: model, epoch)"


def test_weights_in_a_place_that_is_not_known_are_named(tmp_path):
    with pytest.raises(ConversionError, match=r"does not contain a state dict.* its tensors are under 'net', 'optimizer'\. Save"):
        read_weights(saved(tmp_path, {"net": STATE, "optimizer": {"state": {0: torch.zeros(1)}}, "epoch": 3}))


def test_a_file_that_holds_itself_ends(tmp_path):
    content: dict = {"epoch": 3}
    content["model"] = content
    with pytest.raises(ConversionError, match="does not contain a state dict"):
        read_weights(saved(tmp_path, content))


def test_numpy_numbers_arrays_paths_and_settings_beside_the_weights_are_read(tmp_path):
    beside = {
        "best": np.float64(0.4),
        "epoch": np.int64(3),
        "scores": [np.float32(1), np.bool_(True), np.str_("bbox")],
        "random_state": np.random.RandomState(0).get_state(),
        "folder": PosixPath("/runs/first"),
        "args": argparse.Namespace(lr=np.float64(2e-4), output_dir=PosixPath("out")),
        "log": defaultdict(list, {"loss": [1.0]}),
    }
    for legacy in (True, False):
        torch.save({"model": STATE, **beside}, tmp_path / "official.pth", _use_new_zipfile_serialization=not legacy)
        assert read_state_dict(tmp_path / "official.pth").keys() == STATE.keys()


def test_numpy_numbers_of_numpy_1_and_windows_paths_are_read(tmp_path, monkeypatch):
    file = saved(tmp_path, {"model": STATE, "best": np.float64(0.4), "array": np.zeros(3)})
    _replace_in(file, b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert read_state_dict(file).keys() == STATE.keys()
    monkeypatch.setattr(PosixPath, "__reduce__", lambda path: (WindowsPath, ("C:\\", "runs")))
    monkeypatch.setattr(WindowsPath, "__new__", object.__new__)
    assert read_state_dict(saved(tmp_path, {"model": STATE, "folder": PosixPath("runs")})).keys() == STATE.keys()


def _replace_in(file: Path, old: bytes, new: bytes) -> None:
    import zipfile

    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    assert any(old in entry for entry in entries.values())
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, entry in entries.items():
            archive.writestr(name, entry.replace(old, new))


class DictConfig:
    """Resembles OmegaConf's: state with nodes, metadata and types."""

    def __init__(self, content):
        self._metadata = ContainerMetadata()
        self._content = {name: AnyNode(value) for name, value in content.items()}


class ContainerMetadata:
    def __init__(self):
        self.ref_type, self.object_type, self.resolver_cache = dict, str, defaultdict(dict)


class AnyNode:
    def __init__(self, value):
        self._val = value


class AttributeDict(dict):
    """Resembles Lightning's."""


class Unknown:
    pass


def settle(monkeypatch, kind: type, module: str) -> None:
    """Let a class be pickled as one of another package, which reading must not import."""
    for name in accumulate(module.split("."), "{}.{}".format):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(sys.modules[module], kind.__name__, kind, raising=False)
    monkeypatch.setattr(kind, "__module__", module)
    monkeypatch.setattr(kind, "__init__", lambda self: pytest.fail("it was made"), raising=False)


def test_settings_objects_of_other_packages_are_read_without_importing_them(tmp_path, monkeypatch):
    content = {"model": STATE, "cfg": DictConfig({"lr": 1e-4, "data": "coco"}), "hyper_parameters": AttributeDict(lr=1)}
    settle(monkeypatch, DictConfig, "omegaconf.dictconfig")
    settle(monkeypatch, ContainerMetadata, "omegaconf.base")
    settle(monkeypatch, AnyNode, "omegaconf.nodes")
    settle(monkeypatch, AttributeDict, "lightning_fabric.utilities.data")
    file = saved(tmp_path, content)
    for module in ("omegaconf.dictconfig", "omegaconf.base", "omegaconf.nodes", "lightning_fabric.utilities.data"):
        monkeypatch.delitem(sys.modules, module)
    assert read_state_dict(file).keys() == STATE.keys()


@pytest.mark.parametrize("legacy", [False, True])
def test_an_object_of_another_class_is_named_with_the_next_step(tmp_path, legacy):
    torch.save({"model": STATE, "mine": Unknown()}, tmp_path / "official.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ConversionError, match=r"it holds \S*test_reading\.Unknown, .*save the weights alone"):
        read_weights(tmp_path / "official.pth")


class Bomb:
    """What a hostile pickle does when it is read."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def explode(*arguments):
    pytest.fail("a pickle was executed")


@pytest.mark.parametrize(
    "bomb",
    [
        Bomb(exec, "raise SystemExit('a pickle was executed')"),
        Bomb(explode),
        Bomb(getattr, Unknown, "__init__"),
        Bomb(defaultdict, explode),
        Bomb(argparse.Namespace, explode),
    ],
)
def test_a_function_in_a_pickle_is_never_called(tmp_path, bomb):
    with pytest.raises(ConversionError, match="safely|no state dict"):
        read_weights(saved(tmp_path, {"weights": bomb}))
    (tmp_path / "official.pth").write_bytes(pickle.dumps(bomb, protocol=2))
    with pytest.raises(ConversionError, match="safely|no state dict"):
        read_weights(tmp_path / "official.pth")


def test_what_others_registered_with_torch_stays_registered(tmp_path):
    mine = (argparse.Namespace, "argparse.Namespace")
    with torch.serialization.safe_globals([mine]):
        before = set(torch.serialization.get_safe_globals())
        read_weights(saved(tmp_path, STATE))
        assert set(torch.serialization.get_safe_globals()) == before
    assert mine not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize(("content", "problem"), [(b"", "is empty"), (b"name,size\n", "is not a PyTorch file")])
def test_a_text_or_empty_file_is_refused_with_what_is_expected(tmp_path, content, problem):
    (tmp_path / "official.pth").write_bytes(content)
    with pytest.raises(ConversionError, match=rf"official\.pth {problem}: convert takes an official \.pth checkpoint"):
        read_weights(tmp_path / "official.pth")


def test_entries_without_the_prefix_of_the_others_are_named_in_an_error(tmp_path):
    state = prefixed("module.") | {"query_embed.weight": torch.zeros(4, 8)}
    with pytest.raises(ConversionError, match=r"official\.pth, weights of 'module' \(not used: query_embed\): unknown entries"):
        convert_file("solq", saved(tmp_path, state), tmp_path / "out.safetensors")
    with pytest.raises(ConversionError, match=r"^weights of 'module' \(not used: query_embed\): unknown entries"):
        convert("solq", state)


def test_an_unknown_system_is_refused_before_the_file_is_read(tmp_path):
    with pytest.raises(ConversionError, match=r"must be one of solq, .*'official\.pth': the system comes first"):
        convert_file("official.pth", Path("solq"), tmp_path / "out.safetensors")


def test_a_system_without_official_weights_says_so():
    with pytest.raises(ConversionError, match="sextant has no official weights"):
        convert("sextant", STATE)


@pytest.mark.parametrize("arguments", [(STATE, "solq"), (None, STATE), ("solq", "official.pth"), ("solq", None)])
def test_swapped_and_wrong_arguments_are_refused(arguments):
    with pytest.raises(ConversionError, match="the system comes first|convert takes the state dict of official weights"):
        convert.__wrapped__(*arguments)  # without the shape checks of the tests, which refuse them as well


def test_a_recipe_is_not_a_file(tmp_path):
    with pytest.raises(ConversionError, match=r"solq-tiny does not exist\. It is the name of a recipe: name an official \.pth"):
        convert_file("solq", Path("solq-tiny"), tmp_path / "out.safetensors")


def test_folders_and_devices_are_refused(tmp_path):
    with pytest.raises(ConversionError, match="is a folder"):
        read_weights(tmp_path)
    with pytest.raises(ConversionError, match="is not a regular file"):
        read_weights(Path("/dev/null"))
