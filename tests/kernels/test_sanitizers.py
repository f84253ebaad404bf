"""The C library under sanitizers: called from C with random arrays (driver.c), and from Python with wrong ones (hostile.py)."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from maskset.kernels import library

FOLDER = Path(__file__).parents[2] / "src" / "maskset" / "kernels" / "csrc"  # an installed package has no sources
SOURCES = sorted(path for path in FOLDER.glob("*.c") if path.name != "module.c")
DRIVER = Path(__file__).with_name("driver.c")
PROGRAM = Path(__file__).with_name("hostile.py")
FLAGS = ["-std=c11", "-g", "-O0", "-DPLAIN", "-fopenmp-simd", "-fno-sanitize-recover=all"]
SANITIZERS = "-fsanitize=address,undefined,float-cast-overflow"


def built(folder: Path, *sources: Path, into: str) -> subprocess.CompletedProcess:
    compiler = shutil.which("cc") or pytest.skip("there is no C compiler")
    command = [compiler, *FLAGS, SANITIZERS, f"-I{FOLDER}", *map(str, sources), "-lm", "-o", str(folder / into)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("rounds", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_no_function_reads_or_writes_what_is_not_its_own_or_does_what_c_leaves_undefined(tmp_path, rounds):
    (tmp_path / "empty.c").write_text("int main(void) { return 0; }\n")
    built(tmp_path, tmp_path / "empty.c", into="empty")
    if not (tmp_path / "empty").exists() or subprocess.run([tmp_path / "empty"]).returncode:
        pytest.skip("the C compiler has no sanitizers, or they do not run here")
    compiled = built(tmp_path, DRIVER, *SOURCES, into="driver")
    assert compiled.returncode == 0, compiled.stderr
    run = subprocess.run([tmp_path / "driver", str(rounds)], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr[:2000]) == (0, f"{rounds} rounds\n", "")


def exported_functions() -> set[str]:
    """Return the names of the C functions that the library exports."""
    return {
        word.split("(")[0].replace("NAME", "")
        for path in [*SOURCES, *FOLDER.glob("*_body.h")]
        for line in path.read_text().splitlines()
        if "EXPORT" in line
        for word in line.replace("NAME(", "").replace(")(", "(").split()
        if "(" in word
    }


def test_the_driver_calls_every_function_of_the_library():
    exported = exported_functions()
    assert {"runs_encode", "targets_crop", "deformable_attention"} <= exported
    driver = DRIVER.read_text()
    assert not [name for name in sorted(exported) if f"{name}(" not in driver and f"{name}_##suffix(" not in driver]


@pytest.mark.parametrize("examples", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_every_function_refuses_what_it_cannot_read(tmp_path, examples):
    pytest.importorskip("hypothesis")
    checked = built_with_address_sanitizer(tmp_path)
    spec = importlib.util.find_spec("maskset.kernels._kernels")
    if checked is None and (spec is None or library.unavailable_reason()):
        pytest.skip("there is neither a C library nor a compiler for it")
    path, preload = (str(tmp_path / "checked.so"), checked) if checked else (spec.origin, "")
    environment = {**os.environ, "LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, PROGRAM, path, str(examples)], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr[:3000]}\n{run.stderr[-3000:]}"
    lines = run.stdout.splitlines()
    assert len(lines) == len(listed())
    answers = [[int(number) for number in re.findall(r" (\d+)", line)] for line in lines]
    assert min(returned for returned, _ in answers) > 0
    assert sum(refused for _, refused in answers) > len(answers)


def built_with_address_sanitizer(folder: Path) -> str | None:
    """Build the library with AddressSanitizer; return what must be loaded before it, or None where that is not possible."""
    compiler = shutil.which("gcc") if sys.platform == "linux" else None
    if compiler is None:
        return None
    sources = [str(path) for path in FOLDER.glob("*.c") if path.name != "module.c"]
    command = [compiler, *FLAGS, "-fsanitize=address", "-shared", "-fPIC", *sources, "-lm", "-o", str(folder / "checked.so")]
    names = ("libasan.so", "libstdc++.so")  # the second for errors that torch throws
    libraries = [
        subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip() for name in names
    ]
    if subprocess.run(command, capture_output=True).returncode or not all(map(os.path.isabs, libraries)):
        return None
    return " ".join(libraries)


def listed() -> set[str]:
    return set(re.findall(r'^    "(\w+)": \w+,$', PROGRAM.read_text(), re.MULTILINE))


def test_the_program_calls_every_function_of_the_library():
    assert listed() == exported_functions()
