"""Settings as command-line flags."""

from argparse import ArgumentParser
from typing import Literal

import pytest

from maskset import flags
from maskset.config import config, setting
from maskset.errors import ConfigError


@config
class Inner:
    rate: float = setting(0.1, "how fast, 1/s")
    sides: tuple[int, ...] = setting((3, 4), "pixels")


@config
class Outer:
    inner: Inner = Inner()
    kind: Literal["fast", "none"] = setting("fast", "which way")
    frozen: bool = setting(True, "do not move")
    file: str | None = setting(None, "where from")

    def __post_init__(self) -> None:
        if self.inner.rate <= 0:
            raise ConfigError(f"inner.rate must be positive, got {self.inner.rate}.")


def parsed(*arguments: str) -> Outer:
    parser = ArgumentParser()
    flags.add(parser, Outer())
    return flags.apply(Outer(), vars(parser.parse_args(arguments)))


def test_settings_that_are_not_given_keep_their_values():
    assert parsed() == Outer()


def test_a_nested_setting_is_a_flag_with_dots_and_hyphens():
    assert parsed("--inner.rate", "1e-3").inner.rate == 1e-3
    assert [setting.flag for setting in flags.flatten(Outer())] == [
        "--inner.rate",
        "--inner.sides",
        "--kind",
        "--frozen",
        "--file",
    ]


def test_a_list_takes_several_values_or_none():
    assert parsed("--inner.sides", "5", "6", "7").inner.sides == (5, 6, 7)
    assert parsed("--inner.sides").inner.sides == ()


def test_yes_and_no_are_written_true_and_false():
    assert parsed("--frozen", "false").frozen is False


def test_none_is_an_empty_list_and_the_default_that_the_help_shows():
    assert parsed("--inner.sides", "none").inner.sides == ()
    parser = ArgumentParser()
    flags.add(parser, Outer(inner=Inner(sides=())))
    assert "pixels (default: none)" in parser.format_help()


def test_none_is_a_value_only_where_the_setting_may_be_none():
    assert parsed("--file", "none").file is None
    assert parsed("--kind", "none").kind == "none"


def test_the_help_has_the_description_and_the_value_of_each_setting():
    parser = ArgumentParser()
    flags.add(parser, Outer(inner=Inner(rate=0.25)))
    text = " ".join(parser.format_help().split())
    assert "how fast, 1/s (default: 0.25)" in text
    assert "pixels (default: 3 4)" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--inner.rate", "often"), r"^command line: inner\.rate must be a number, got 'often'\.$"),
        (("--kind", "slow"), r"^command line: kind must be 'fast' or 'none', got 'slow'\.$"),
        (("--frozen", "maybe"), r"^command line: frozen must be true or false, got 'maybe'\.$"),
        (("--inner.sides", "1", "2.5"), r"^command line: inner\.sides\.1 must be a whole number, got '2\.5'\.$"),
        (("--inner.rate", "-1"), r"^command line: inner.rate must be positive, got -1.0\.$"),
    ],
)
def test_a_value_that_is_not_allowed_is_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        parsed(*arguments)
