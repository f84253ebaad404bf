"""`maskset info` tells what a bug report needs."""

import pytest

from maskset import __version__, cli
from maskset.kernels import library
from maskset.kernels.attention import implementations


@pytest.fixture
def lines(capsys) -> dict[str, str]:
    """The values that `maskset info` prints by their name."""
    assert cli.main(["info"]) == 0
    return {line[:22].strip(): line[22:].strip() for line in capsys.readouterr().out.splitlines()}


def test_versions_and_devices_are_listed(lines):
    import torch

    assert lines["maskset"] == __version__
    assert lines["torch"].startswith(torch.__version__.partition("+")[0])
    assert "cores" in lines["CPU"]
    assert "GPU" in lines or "cuda:0" in lines


def test_each_attention_implementation_works_or_says_why_not(lines):
    for name, reason in implementations().items():
        assert lines[f"attention, {name}"] == (reason or "works")
    assert lines["C library"] == (library.unavailable_reason() or "works")


def test_a_hidden_c_library_is_reported_with_the_variable_that_hides_it(monkeypatch, capsys):
    monkeypatch.setenv("MASKSET_NATIVE", "off")
    assert cli.main(["info"]) == 0
    output = capsys.readouterr().out
    assert output.count("MASKSET_NATIVE=off disables it") == 2  # the library, and its attention
    assert "\nMASKSET_NATIVE" in output


@pytest.mark.parametrize(("failure", "expected"), [(None, "works"), ("the output is wrong in torch.float16",) * 2])
def test_on_a_gpu_the_triton_kernels_are_checked(failure, expected, monkeypatch, capsys):
    monkeypatch.setattr("maskset.kernels.attention.torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("maskset.kernels.attention._TRITON", True)
    monkeypatch.setattr("maskset.kernels.attention.triton_failure", lambda device: failure)
    assert cli.main(["info"]) == 0
    assert f"attention, triton     {expected}\n" in capsys.readouterr().out
