"""The C library under the sanitizers for addresses and undefined behaviour, over random and hostile arrays: see driver.c."""

import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "src" / "maskset" / "kernels" / "csrc"  # an installed package has no sources
SOURCES = sorted(path for path in FOLDER.glob("*.c") if path.name != "module.c")
DRIVER = Path(__file__).with_name("driver.c")
FLAGS = ["-std=c11", "-g", "-O0", "-DPLAIN", "-fopenmp-simd", "-fno-sanitize-recover=all"]
SANITIZERS = "-fsanitize=address,undefined,float-cast-overflow"


def built(folder: Path, *sources: Path, into: str) -> subprocess.CompletedProcess:
    compiler = shutil.which("cc") or pytest.skip("there is no C compiler")
    command = [compiler, *FLAGS, SANITIZERS, f"-I{FOLDER}", *map(str, sources), "-lm", "-o", str(folder / into)]
    return subprocess.run(command, capture_output=True, text=True)


def test_no_function_reads_or_writes_what_is_not_its_own_or_does_what_c_leaves_undefined(tmp_path):
    (tmp_path / "empty.c").write_text("int main(void) { return 0; }\n")
    built(tmp_path, tmp_path / "empty.c", into="empty")
    if not (tmp_path / "empty").exists() or subprocess.run([tmp_path / "empty"]).returncode:
        pytest.skip("the C compiler has no sanitizers, or they do not run here")
    compiled = built(tmp_path, DRIVER, *SOURCES, into="driver")
    assert compiled.returncode == 0, compiled.stderr
    run = subprocess.run([tmp_path / "driver", "1000"], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr[:2000]) == (0, "1000 rounds\n", "")


def test_the_driver_calls_every_function_of_the_library():
    exported = {
        word.split("(")[0].replace("NAME", "")
        for path in [*SOURCES, *FOLDER.glob("*_body.h")]
        for line in path.read_text().splitlines()
        if "EXPORT" in line
        for word in line.replace("NAME(", "").replace(")(", "(").split()
        if "(" in word
    }
    assert {"runs_encode", "targets_crop", "deformable_attention"} <= exported
    driver = DRIVER.read_text()
    assert not [name for name in sorted(exported) if f"{name}(" not in driver and f"{name}_##suffix(" not in driver]
