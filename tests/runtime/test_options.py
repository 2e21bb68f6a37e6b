"""Options of a command line that are derived from settings."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest

from runtime.bench.settings import BenchSettings
from runtime.engine.execution import Execution
from runtime.generation.settings import GenerationSettings
from runtime.options import add_options, read_options


@dataclass(frozen=True)
class Every:
    """One field of every kind."""

    count: int = field(default=3, metadata={"help": "a number", "metavar": "N"})
    share: float | None = field(default=None, metadata={"help": "a share"})
    where: Path | None = field(default=None, metadata={"help": "a file"})
    words: Sequence[str] | None = field(default=None, metadata={"help": "some words"})
    on: bool = field(default=True, metadata={"help": "turn it off"})
    off: bool = field(default=False, metadata={"help": "turn it on"})
    symmetric: bool = field(default=True, metadata={"help": "the other way", "option": "--asymmetric"})
    maybe: bool | None = field(default=None, metadata={"help": "not said"})
    either: bool | None = field(default=None, metadata={"help": "yes or no", "either": True})
    several: Sequence[str] = field(default=(), metadata={"help": "one each time", "repeated": True})
    pairs: Mapping[int, float] | None = field(default=None, metadata={"help": "A=B each time", "repeated": True})
    inner: int = 7


def parse(*words: str, settings: type[Any] = Every, leave_out: Sequence[str] = ()) -> Any:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_options(parser, settings, leave_out)
    return read_options(settings, parser.parse_args(words))


@pytest.mark.parametrize("settings", [Every, Execution, GenerationSettings, BenchSettings])
def test_without_options_settings_are_their_defaults(settings: type[Any]) -> None:
    assert parse(settings=settings) == settings()


def test_every_kind_of_option_sets_its_field() -> None:
    words = "--count 5 --share 0.5 --where a/b --words x y --no-on --off --asymmetric --maybe --no-either"
    assert parse(*words.split()) == Every(5, 0.5, Path("a/b"), ["x", "y"], False, True, False, True, False)
    assert parse("--either").either is True


def test_a_field_without_help_is_not_an_option() -> None:
    with pytest.raises((argparse.ArgumentError, SystemExit)):
        parse("--inner", "3")
    with pytest.raises((argparse.ArgumentError, SystemExit)):
        parse("--provider", "cpu", settings=Execution, leave_out=("provider",))


def test_values_that_are_given_win() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, Every)
    assert read_options(Every, parser.parse_args(["--count", "5"]), count=9, inner=1) == Every(count=9, inner=1)


def test_every_field_of_the_shared_settings_is_an_option_with_help() -> None:
    for settings in (Execution, GenerationSettings):
        assert all(entry.metadata["help"] for entry in fields(settings))


def test_repeated_options_take_one_value_each_time_and_leave_what_follows_alone() -> None:
    found = parse("--several", "a", "--pairs", "3=1.5", "--several", "-b c", "--pairs", "4=-inf", "--pairs", "3=2")
    assert list(found.several) == ["a", "-b c"]
    assert found.pairs == {3: 2.0, 4: float("-inf")}
    with pytest.raises(argparse.ArgumentError, match="'x' is not of the form KEY=VALUE"):
        parse("--pairs", "x")
