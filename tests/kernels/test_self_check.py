"""The check of the Triton kernels at their first use, with kernels that are right, wrong, or raise an error."""

import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

from maskset.kernels import attention, library, self_check

CPU = torch.device("cpu")


@pytest.fixture
def kernels(monkeypatch):
    """Return fake Triton kernels, which are right: those of the C library, on the CPU."""
    if why := library.unavailable_reason():
        pytest.skip(why)

    def in_types_of(results, *likes):
        return tuple(result.to(like.dtype) for result, like in zip(results, likes, strict=True))

    fake = SimpleNamespace(
        forward=lambda value, *rest: attention.forward(value, *rest).to(value.dtype),
        backward=lambda grad, value, shapes, *rest: in_types_of(attention.backward(grad, value, shapes, *rest), value, *rest),
    )
    monkeypatch.setitem(sys.modules, "maskset.kernels.attention_triton", fake)
    self_check._failure.cache_clear()
    yield fake
    self_check._failure.cache_clear()


def test_kernels_that_agree_are_used_without_a_warning(kernels):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert self_check.triton_failure(CPU) is None


def test_kernels_that_do_not_compile_are_not_used(kernels):
    def forward(*_):
        raise RuntimeError("PTX was compiled with an unsupported toolchain\nand more")

    kernels.forward = forward
    with pytest.warns(RuntimeWarning, match="do not work on cpu: RuntimeError in torch.float32: PTX was compiled with an"):
        assert "unsupported toolchain" in self_check.triton_failure(CPU)


@pytest.mark.parametrize(("output", "name"), [(0, "gradient of value"), (1, "gradient of locations"), (2, "gradient of weights")])
@pytest.mark.parametrize("wrong", [1.001, float("nan")])
def test_one_wrong_gradient_is_enough_for_the_plain_path(kernels, output, name, wrong):
    right = kernels.backward

    def backward(*inputs):
        gradients = list(right(*inputs))
        gradients[output] = gradients[output] * wrong
        return gradients

    kernels.backward = backward
    with pytest.warns(RuntimeWarning, match=f"the {name} is wrong in torch.float32"):
        self_check.triton_failure(CPU)


def test_a_type_that_alone_is_wrong_is_noticed(kernels):
    right = kernels.forward
    kernels.forward = lambda value, *rest: right(value, *rest) * (1.1 if value.dtype == torch.bfloat16 else 1)
    with pytest.warns(RuntimeWarning, match="the output is wrong in torch.bfloat16"):
        self_check.triton_failure(CPU)


def test_a_failure_is_a_warning_only_once_and_is_remembered(kernels):
    calls = []
    kernels.forward = lambda *inputs: calls.append(inputs)
    with pytest.warns(RuntimeWarning, match="The slower plain path is used") as caught:
        reasons = [self_check.triton_failure(CPU) for _ in range(3)]
    assert len(caught) == len(calls) == 1
    assert len(set(reasons)) == 1


def test_the_check_leaves_the_random_state_alone(kernels):
    before = torch.get_rng_state()
    self_check.triton_failure(CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_deformable_attention_falls_back_to_the_plain_path(kernels, monkeypatch):
    kernels.forward = None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention, "_TRITON", True)
    monkeypatch.setattr(attention, "_GPU", CPU)
    monkeypatch.setattr(attention, "FUSED", {"triton": "cpu"})
    monkeypatch.delenv(attention.ATTENTION_ENV, raising=False)
    with pytest.warns(RuntimeWarning, match="The slower plain path is used"):
        out = attention.deformable_attention(
            torch.ones(1, 1, 1, 1), [(1, 1)], torch.full((1, 1, 1, 1, 1, 2), 0.5), torch.ones(1, 1, 1, 1, 1)
        )
    assert out.item() == 1
    assert "TypeError in torch.float32" in str(attention.implementations()["triton"])


def test_compiled_code_contains_the_result_of_the_check(kernels):
    compiled = torch.compile(
        lambda x: x + (1 if self_check.triton_failure(x.device) is None else 2), fullgraph=True, backend="eager"
    )
    assert compiled(torch.zeros(1)).item() == 1
