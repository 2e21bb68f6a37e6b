"""The types of settings' fields, checked once, where they come in. Imports without PyTorch.

NumPy's numbers count as Python's and become those. True is not 1, 1.0 is not a whole number, and text is no number.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from .errors import SettingsError

_SPELT = {int: "a whole number", float: "a number", bool: "True or False", str: "text", Path: "a path"}
_NO_SEQUENCES = (str, bytes, bytearray, memoryview)
"""Sequences of characters and bytes, which are no sequences of numbers or names."""


def check_fields(settings: Any) -> None:
    """Check every field of a dataclass against its annotation. Raises SettingsError."""
    for name, kind in typing.get_type_hints(type(settings)).items():
        object.__setattr__(settings, name, typed(name, getattr(settings, name), kind))  # the dataclass is frozen


def typed(name: str, value: Any, kind: Any) -> Any:
    """A setting's value in its type: one of Python's simple ones, a class, `... | None`, or a sequence of those. Raises
    SettingsError if it is of another type."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        if value is None:
            return None
        (kind,) = (part for part in typing.get_args(kind) if part is not types.NoneType)
    if typing.get_origin(kind) in (tuple, list, Sequence):
        if isinstance(value, _NO_SEQUENCES) or not isinstance(value, Sequence):
            raise SettingsError(name, value, f"it must be a sequence, not {type(value).__name__}")
        found = [typed(name, part, typing.get_args(kind)[0]) for part in value]
        return found if isinstance(value, list) else tuple(found)
    if not _is(value, kind):
        spelt = _SPELT.get(kind, f"a {kind.__name__}")
        raise SettingsError(name, value, f"it must be {spelt}, not {type(value).__name__}")
    try:
        return _plain(value, kind)
    except OverflowError:
        raise SettingsError(name, value, "it must be a number that a float can hold") from None


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
