import pytest

from maskset.kernels import library


@pytest.fixture
def both(monkeypatch):
    """Return a function that returns what some work gives with the C library, and what it gives without."""
    if why := library.unavailable_reason():
        pytest.skip(why)

    def with_and_without(work):
        with_library = work()
        with monkeypatch.context() as hidden:
            hidden.setenv(library.NATIVE_ENV, "off")
            return with_library, work()

    return with_and_without
