"""Systems are tested with every implementation of deformable attention that works here, and without the C library.

By default the fastest is taken, and SOLQ's official numbers are also compared without the C library; `-m slow` does the rest.
With `MASKSET_TEST_DEVICE=cuda` the systems compute on a GPU, each in its fastest way only.
"""

import os

import pytest
from on_device import systems_on

from maskset.kernels import library
from maskset.kernels.attention import implementations, using

ATTENTIVE = ("solq", "soit", "isda")  # which have deformable attention
DEVICE = os.environ.get("MASKSET_TEST_DEVICE")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    name = metafunc.module.__name__.rpartition(".")[2]
    others = [one for one, why in implementations().items() if why is None and one != "triton"]
    ways = ["fastest"]
    if DEVICE and name.endswith("parity"):
        ways = [f"on {DEVICE}"]
    elif name.endswith("parity") and library.handle() is not None:
        ways += [pytest.param("no library", marks=[] if name == "test_solq_parity" else pytest.mark.slow)]
    if not DEVICE and (name == "test_contract" or name in [f"test_{system}_parity" for system in ATTENTIVE]):
        ways += [pytest.param(one, marks=pytest.mark.slow) for one in others]
    metafunc.parametrize("_computed_by", ways, indirect=True, scope="module")


@pytest.fixture(scope="module", autouse=True)
def _computed_by(request: pytest.FixtureRequest):
    for function in vars(request.module).values():
        if hasattr(function, "cache_clear"):  # what other implementations made
            function.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "no library":
            patch.setenv(library.NATIVE_ENV, "off")
            yield
        elif request.param == "fastest":
            yield
        elif request.param.startswith("on "):
            with systems_on(request.param.removeprefix("on ")):
                yield
        else:
            with using(request.param):
                yield
