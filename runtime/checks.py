"""The types of arguments and of settings' fields, checked once, where they come in.

NumPy's numbers count as Python's and become those. True is not 1, 1.0 is not a whole number, and text is no number.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np

from .errors import PromptError, SettingsError, shown

_SPELT = {int: "a whole number", float: "a number", bool: "True or False", str: "text", Path: "a path"}
_NO_SEQUENCES = (str, bytes, bytearray, memoryview)
"""Sequences of characters and bytes, which are no sequences of numbers or names."""


def check_fields(settings: Any) -> None:
    """Check every field of a dataclass against its annotation. Raises SettingsError."""
    for name, kind in typing.get_type_hints(type(settings)).items():
        object.__setattr__(settings, name, typed(name, getattr(settings, name), kind))  # the dataclass is frozen


def typed(name: str, value: Any, kind: Any) -> Any:
    """A setting's value in its type: one of Python's simple ones, a class, `... | None`, or a tuple, sequence or
    mapping of those. Raises SettingsError if it is of another type."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        if value is None:
            return None
        (kind,) = (part for part in typing.get_args(kind) if part is not types.NoneType)
    if typing.get_origin(kind) in (tuple, list, Sequence):
        if not is_sequence(value):
            raise SettingsError(name, value, f"it must be a sequence, not {type(value).__name__}")
        found = [typed(name, part, typing.get_args(kind)[0]) for part in value]
        return found if isinstance(value, list) and typing.get_origin(kind) is not tuple else tuple(found)
    if typing.get_origin(kind) is Mapping:
        if not isinstance(value, Mapping):
            raise SettingsError(name, value, f"it must be a mapping, not {type(value).__name__}")
        keys, values = typing.get_args(kind)
        return {typed(name, key, keys): typed(name, part, values) for key, part in value.items()}
    if not _is(value, kind):
        raise SettingsError(name, value, f"it must be {_spelt(kind)}, not {type(value).__name__}")
    try:
        return _plain(value, kind)
    except OverflowError:
        raise SettingsError(name, value, "it must be a number that a float can hold") from None


def whole_number(name: str, value: Any, least: int, most: int | None = None) -> int:
    """An argument that counts something. Raises SettingsError for another type, and outside `least` to `most`."""
    number: int = typed(name, value, int)
    if number < least or (most is not None and number > most):
        rule = f"it must be at least {least}" if most is None else f"it must be {least} to {most}"
        raise SettingsError(name, number, rule)
    return number


def instance(name: str, value: Any, kind: type[Any]) -> None:
    """Raise SettingsError for an argument that is not of a class."""
    if not isinstance(value, kind):
        raise SettingsError(name, value, f"it must be a {kind.__name__}, not {type(value).__name__}")


def is_sequence(value: Any) -> bool:
    """Whether a value has elements in an order. The characters and bytes of a text are none."""
    return isinstance(value, Sequence) and not isinstance(value, _NO_SEQUENCES)


def integers(values: Any, what: str) -> list[int]:
    """Whole numbers of a sequence or a NumPy array (N,). what: one of them, for the message. Raises PromptError for
    anything else: a mask of booleans names nothing, and the bytes of a text are not its tokens."""
    if not isinstance(values, list | tuple):
        values = _elements(values, what)
    if set(map(type, values)) <= {int}:
        return list(values)
    for value in values:
        if not _is(value, int):
            raise PromptError(f"{what} {shown(value)} is not a whole number but of type {type(value).__name__}")
    return [int(value) for value in values]


def numbers(name: str, value: Any, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(count,) float64: one number for all, or one for each. Raises SettingsError, for "not a number" too."""
    each = "it must be a number, or one for each row"
    several = value.tolist() if isinstance(value, np.ndarray) else value
    if isinstance(several, list | tuple):
        if len(several) != count:
            raise SettingsError(name, value, f"{each}, of which there are {count}")
        found = [typed(name, part, float) for part in several]
    else:
        found = [typed(name, several, float)] * count
    array = np.array(found, np.float64)
    if np.isnan(array).any():
        raise SettingsError(name, "nan", "it must be a number")
    return array


def _elements(values: Any, what: str) -> Sequence[Any]:
    if hasattr(values, "__array__"):
        array = np.asarray(values)
        if array.ndim != 1:
            raise PromptError(f"an array of shape {array.shape} is not a sequence of {what}s, (N,)")
        elements: list[Any] = array.tolist()
        return elements
    if not is_sequence(values):
        raise PromptError(f"{shown(values)} is not a sequence of {what}s")
    found: Sequence[Any] = values
    return found


def _is(value: Any, kind: Any) -> bool:
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if kind is Path:
        return isinstance(value, str | Path) and "\0" not in str(value)
    return isinstance(value, kind)


def _plain(value: Any, kind: Any) -> Any:
    if kind is float:
        number = float(value)
        return int(value) if isinstance(value, Integral) else number
    return kind(value) if kind in (int, str, Path) else value


def _spelt(kind: Any) -> str:
    return _SPELT.get(kind, f"a {kind.__name__}")
