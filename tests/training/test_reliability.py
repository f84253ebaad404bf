"""How training ends when its surroundings fail: signals to a group, readers killed, full disks, no memory, a second process."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from runs import assert_same_run, data, lines, recipe

from maskset import config
from maskset.data import loading, open_data
from maskset.data.loading import training_batches
from maskset.errors import ConfigError, ResourceError
from maskset.files import lock_folder
from maskset.recipe import Recipe
from maskset.training import train as loop
from maskset.training.dry_run import measure_cost
from maskset.training.guards import explain_shortages, restore_process_settings
from maskset.training.train import train

resource = pytest.importorskip("resource")  # not on Windows


def with_workers(count: int, **settings) -> Recipe:
    asked = recipe(**settings)
    return replace(asked, data=replace(asked.data, workers=count))


def start(folder, settings, **options):
    """Start `maskset train` as a process group of its own."""
    file = folder.parent / f"{folder.name}.json"
    config.write(settings, file)
    command = [sys.executable, "-m", "maskset", "train", file, "--data", data(), "--out", folder]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True, **options)


def wait_for_lines(process, folder, count):
    file = folder / "metrics.jsonl"
    while process.poll() is None and (not file.exists() or file.read_bytes().count(b"\n") < count):
        time.sleep(0.002)


@contextmanager
def file_size_limit(size):
    """Let no file grow beyond a size, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_sigterm_to_the_whole_group_writes_a_checkpoint(tmp_path):
    train(with_workers(2, epochs=3), data(), tmp_path / "whole")
    process = start(tmp_path / "run", with_workers(2, epochs=3))
    wait_for_lines(process, tmp_path / "run", 2)
    os.killpg(process.pid, signal.SIGTERM)
    os.killpg(process.pid, signal.SIGTERM)  # timeout sends it to the process and to its group
    _, message = process.communicate(timeout=60)
    assert process.returncode == 143, message
    assert len(message.splitlines()) == 1, message
    done = [line for line in lines(tmp_path / "run") if line["split"] == "train"]
    assert f"stopped after step {len(done)}," in message
    train(with_workers(2, epochs=3), data(), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_killed_reader_ends_training_in_one_line(tmp_path):
    process = start(tmp_path / "run", with_workers(1, epochs=50))
    wait_for_lines(process, tmp_path / "run", 2)
    children = [int(name) for name in os.listdir("/proc") if name.isdigit() and parent_of(name) == process.pid]
    os.kill(max(children), signal.SIGKILL)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 2, message
    assert len(message.splitlines()) == 1, message
    assert "a process that reads images was killed" in message


def parent_of(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return int(file.read().rsplit(")", 1)[1].split()[1])
    except OSError:
        return None


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    with file_size_limit(100_000), pytest.raises(OSError, match=r"run/state\.safetensors"):
        train(recipe(), data(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_log_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "update", limited(loop.update))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match=r"run/metrics\.jsonl"):
            train(recipe(), data(), tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def limited(update):
    def with_limit(*arguments):
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return update(*arguments)

    return with_limit


def test_a_batch_that_does_not_fit_into_shared_memory_is_an_error_and_no_hang():
    settings = with_workers(1).data
    batches = training_batches(open_data(data(), "train"), settings, 2, 32, 0, 0)
    with file_size_limit(1000), pytest.raises(ResourceError, match="--shm-size=8g, or .*data.workers 0"):  # as small a /dev/shm
        next(batches)


def test_shared_memory_without_room_for_a_reader_is_an_error_that_names_it(monkeypatch):
    monkeypatch.setattr(loading.shutil, "disk_usage", lambda _: SimpleNamespace(free=16_384))
    batches = training_batches(open_data(data(), "train"), with_workers(1).data, 2, 32, 0, 0)
    with pytest.raises(ResourceError, match=r"/dev/shm.* too small for the processes .*16384 bytes .*data.workers 0"):
        next(batches)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 8 GiB"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
    ],
    ids=["numpy", "cuda", "cpu"],
)
def test_out_of_memory_names_the_settings_that_help(error):
    with pytest.raises(ResourceError, match="train.batch_size.*train.checkpoint_activations"), explain_shortages():
        raise error


def test_other_errors_are_left_alone():
    with pytest.raises(RuntimeError, match="of another kind"), explain_shortages():
        raise RuntimeError("of another kind")


def test_a_model_too_large_for_any_machine_is_one_line(tmp_path):
    asked = recipe()
    with pytest.raises(ResourceError, match="not enough memory"):
        train(replace(asked, model=replace(asked.model, hidden_dim=2**28)), data(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("reader", ["gone", pytest.param("full", marks=pytest.mark.slow)])
def test_training_goes_on_when_nobody_reads_its_output(tmp_path, reader):
    if reader == "full":
        with open("/dev/full", "w") as full:
            process = start(tmp_path / "run", recipe(epochs=1), stdout=full)
    else:
        process = start(tmp_path / "run", recipe(epochs=1), stdout=subprocess.PIPE)
        process.stdout.close()
        process.stdout = None
    _, message = process.communicate(timeout=60)
    assert "Traceback" not in message
    assert [line["split"] for line in lines(tmp_path / "run")] == [*["train"] * 5, "val"]
    assert (tmp_path / "run" / "best.safetensors").exists()


def test_a_folder_that_is_being_written_to_is_refused(tmp_path):
    with lock_folder(tmp_path), pytest.raises(ConfigError, match="another process is writing to"):
        train(recipe(), data(), tmp_path)


@pytest.mark.slow
def test_a_second_process_is_refused_and_a_killed_one_does_not_keep_the_folder(tmp_path):
    process = start(tmp_path / "run", with_workers(1, epochs=50))
    wait_for_lines(process, tmp_path / "run", 1)
    with pytest.raises(ConfigError, match="another process is writing to"):
        train(with_workers(1, epochs=50), data(), tmp_path / "run", resume=True)
    process.kill()
    process.communicate()
    with lock_folder(tmp_path / "run"):  # at once, although its reader lives some seconds longer
        pass


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(95, "Operation not supported")))
    with lock_folder(tmp_path / "new"):
        assert (tmp_path / "new").is_dir()
    assert not (tmp_path / "new").exists()


def test_the_folder_is_checked_before_anything_is_read(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file is a file"):
        train("no-such-recipe", "no-such-data", tmp_path / "file")


def test_training_leaves_the_process_as_it_was(tmp_path):
    torch.set_num_threads(3)
    own = Accelerator(cpu=True)
    before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), dict(os.environ)
    for run in (lambda: train(recipe(epochs=1), data(), tmp_path / "run"), lambda: measure_cost(recipe(), data())):
        run()
        assert torch.get_num_threads() == 3
        assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), dict(os.environ)) == before
        assert own.mixed_precision == "no"  # unless its state is gone
    torch.set_num_threads(1)


def test_random_states_and_the_environment_are_restored(monkeypatch):
    monkeypatch.setenv("MASKSET_TEST", "before")
    before = random.getstate()
    with restore_process_settings():
        random.seed(1)
        os.environ["MASKSET_TEST"] = "inside"
        os.environ["MASKSET_NEW"] = "inside"
    assert random.getstate() == before
    assert os.environ["MASKSET_TEST"] == "before"
    assert "MASKSET_NEW" not in os.environ


def test_accelerates_state_is_reset_through_a_private_function_that_still_exists():
    assert callable(AcceleratorState._reset_state)
    assert isinstance(AcceleratorState._shared_state, dict)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("WORLD_SIZE", "abc", "WORLD_SIZE must be a whole number"),
        pytest.param("ACCELERATE_USE_DEEPSPEED", "true", "ACCELERATE_USE_DEEPSPEED", marks=pytest.mark.slow),
        pytest.param("ACCELERATE_TORCH_DEVICE", "x", "ACCELERATE_TORCH_DEVICE", marks=pytest.mark.slow),
    ],
)
def test_what_the_environment_asks_for_in_vain_is_named(tmp_path, variable, value, message):
    process = start(tmp_path / "run", recipe(), env={variable: value})
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert len(error.splitlines()) == 1
    assert message in error


def test_training_without_progress_prints_nothing(tmp_path, capfd):
    train(recipe(epochs=1), data(), tmp_path / "run", progress=False)
    assert capfd.readouterr() == ("", "")
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["split"] == "val"
