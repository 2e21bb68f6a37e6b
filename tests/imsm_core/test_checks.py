"""Fields of settings, of wrong types: one error that names the field, and nothing that is taken for something else."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.settings import ExportSettings
from imsm_core import SettingsError, TrainSettings, TuneSettings, make_gate

ODD: list[Any] = [
    *(None, True, ..., object(), int, Path("a"), Decimal(1), 1j, "", "3", "hot", b"ab", bytearray(b"ab")),
    *(0, 1, 3, -1, 2**70, -(2**70), 2**20000, 0.0, 1.0, 2.5, 1e400, float("nan"), np.int64(3), np.float32(0.5)),
    *(
        np.bool_(True),
        np.array(3),
        np.array([3]),
        [],
        [3],
        ["a"],
        [1.5],
        [True],
        [None],
        ("a",),
        {3},
        {"a": 1},
        iter([3]),
    ),
]


def is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return is_whole(value) or isinstance(value, float | np.floating)


def all_of(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and all(map(kind, value))


def is_text(value: Any) -> bool:
    return isinstance(value, str)


KINDS: dict[Any, Callable[[Any], bool]] = {
    int: is_whole,
    float: is_number,
    bool: lambda value: isinstance(value, bool),
    str: is_text,
    Path: lambda value: isinstance(value, str | Path),
}


def right(value: Any, kind: Any) -> bool:
    if type(None) in typing.get_args(kind):
        if value is None:
            return True
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is not None:
        return all_of(KINDS[typing.get_args(kind)[0]])(value)
    return KINDS[kind](value)


@pytest.mark.parametrize("settings", [TuneSettings, TrainSettings, ExportSettings])
def test_a_field_has_its_type_or_is_refused(settings: type[Any]) -> None:
    kinds = typing.get_type_hints(settings)
    refused = set()
    for field in dataclasses.fields(settings):
        for value in ODD:
            try:
                settings(**{field.name: value})
            except SettingsError as error:
                refused.add(field.name)
                if "\n" in str(error):
                    pytest.fail(f"{value!r}: {error}")
            else:
                assert right(value, kinds[field.name]), f"{field.name}={value!r} was accepted"
    assert refused == set(kinds)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainSettings(steps="3"), "steps is 3; it must be a whole number, not str"),
        (lambda: TrainSettings(batch_size=True), "batch_size is True; it must be a whole number, not bool"),
        (lambda: TrainSettings(learning_rate=float("nan")), "learning_rate is nan; it must be above 0 and at most 100"),
        (lambda: TrainSettings(epochs=10**400), "it must be a number that a float can hold"),
        (lambda: TuneSettings(target_modules="q_proj"), "target_modules is q_proj; it must be a sequence, not str"),
        (lambda: TuneSettings(token_indices=[3, "4"]), "token_indices is 4; it must be a whole number, not str"),
        (lambda: ExportSettings(block_size=32.0), "block_size is 32.0; it must be a whole number, not float"),  # type: ignore[arg-type]
        (
            lambda: ExportSettings(max_perplexity_change=float("nan")),
            "max_perplexity_change is nan; it must be a number",
        ),
        (lambda: make_gate("token", 8, True), "gate_rank is True; it must be a whole number, not bool"),
        (lambda: make_gate(["token"], 8), "gate is token; it must be text, not list"),
    ],
)
def test_the_message_says_what_is_wanted(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(SettingsError) as raised:
        make()
    assert message in str(raised.value)


def test_numbers_of_numpy_and_paths_as_text_become_what_the_field_says() -> None:
    settings = TrainSettings(steps=np.int64(3), learning_rate=np.float32(0.5))
    assert settings == TrainSettings(steps=3, learning_rate=0.5)
    assert (type(settings.steps), type(settings.learning_rate), type(settings.epochs)) == (int, float, int)
    assert ExportSettings("int4", calibrate="texts.jsonl").calibrate == Path("texts.jsonl")  # type: ignore[arg-type]
