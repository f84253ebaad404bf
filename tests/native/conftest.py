import pytest

from maskset import native


@pytest.fixture
def both(monkeypatch):
    """Return a function that returns what some work gives with the C library, and what it gives without."""
    if why := native.why_not():
        pytest.skip(why)

    def with_and_without(work):
        with_library = work()
        with monkeypatch.context() as hidden:
            hidden.setenv(native.HIDE, "off")
            return with_library, work()

    return with_and_without
