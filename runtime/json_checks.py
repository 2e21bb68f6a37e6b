"""Checks of a JSON document, put together from small ones.

A check takes a value and where it stands, and raises DamagedError if the value is none of what it must be. Types are
strict: true is no number, 1.0 is no whole number, "5" is neither.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

from .printable import shortened

Check = Callable[[Any, str], None]
MOST = 2**31 - 1
MOST_BYTES = 2**63 - 1
DEEPEST = 50
"""How deeply a document may be nested; the manifest needs 6."""
LARGEST = 1.7e308  # what a float can hold


class DamagedError(ValueError):
    """What stands at a place of a document, and what it must be: one line."""

    def __init__(self, place: str, value: Any, rule: str) -> None:
        super().__init__(f"{place} is {shortened(value)}; it must be {rule}")


class MissingError(DamagedError):
    """Nothing stands where something must."""

    def __init__(self, place: str) -> None:
        ValueError.__init__(self, f"{place} is missing")


def whole(least: int = 0, most: int = MOST, multiple: int = 1) -> Check:
    """A whole number from `least` to `most`, a multiple of `multiple`."""
    rule = f"a whole number from {least} to {most}" if least < most else str(least)

    def check(value: Any, place: str) -> None:
        if type(value) is not int or not least <= value <= most or value % multiple:
            raise DamagedError(place, value, rule if multiple == 1 else f"{rule}, a multiple of {multiple}")

    return check


def number(least: float = -LARGEST, most: float = LARGEST) -> Check:
    """A number from `least` to `most`."""
    rule = "a number" + (f" from {least:g}" if least != -LARGEST else "") + (f" to {most:g}" if most < 1e300 else "")

    def check(value: Any, place: str) -> None:
        if type(value) not in (int, float) or not least <= value <= most:
            raise DamagedError(place, value, rule)

    return check


def within(rule: str, holds: Callable[[float], bool]) -> Check:
    """A number of which something holds. rule: what, in words."""

    def check(value: Any, place: str) -> None:
        if type(value) not in (int, float) or not holds(value):
            raise DamagedError(place, value, rule)

    return check


def text(pattern: str = "(?s).*", rule: str = "text") -> Check:
    """Text that matches the whole pattern."""
    wanted = re.compile(pattern)

    def check(value: Any, place: str) -> None:
        if type(value) is not str or not wanted.fullmatch(value):
            raise DamagedError(place, value, rule)

    return check


def flag(value: Any, place: str) -> None:
    """true or false."""
    if type(value) is not bool:
        raise DamagedError(place, value, "true or false")


def anything(value: Any, place: str) -> None:
    """Whatever JSON holds."""


def one_of(*choices: str) -> Check:
    """One of these texts."""

    def check(value: Any, place: str) -> None:
        if type(value) is not str or value not in choices:
            raise DamagedError(place, value, ("one of " if len(choices) > 1 else "") + ", ".join(choices))

    return check


def either(first: Check, second: Check, rule: str) -> Check:
    """What one of two checks lets pass."""

    def check(value: Any, place: str) -> None:
        for attempt in (first, second):
            try:
                return attempt(value, place)
            except DamagedError:
                continue
        raise DamagedError(place, value, rule)

    return check


def optional(inner: Check) -> Check:
    """null, or what `inner` lets pass."""

    def check(value: Any, place: str) -> None:
        if value is not None:
            inner(value, place)

    return check


def items(inner: Check, least: int = 0) -> Check:
    """A list of at least `least` values, each of which `inner` lets pass."""

    def check(value: Any, place: str) -> None:
        if type(value) is not list or len(value) < least:
            raise DamagedError(place, value, "a list" + (f" of at least {least}" if least else ""))
        for index, item in enumerate(value):
            inner(item, f"{place}[{index}]")

    return check


def table(inner: Check) -> Check:
    """An object of any keys, whose values `inner` lets pass."""

    def check(value: Any, place: str) -> None:
        if type(value) is not dict:
            raise DamagedError(place, value, "an object")
        for key, item in value.items():
            inner(item, f"{place}.{shortened(key, quoted=False)}")

    return check


class Record:
    """An object that has these keys. What it has besides is not looked at: a later program may have written it."""

    def __init__(self, fields: dict[str, Check], may_lack: dict[str, Check] | None = None) -> None:
        self.fields = fields
        self.may_lack = may_lack or {}

    def __call__(self, value: Any, place: str) -> None:
        if type(value) is not dict:
            raise DamagedError(place or "the document", value, "an object")
        for name, check in (self.fields | self.may_lack).items():
            inner = f"{place}.{name}" if place else name
            if name in value:
                check(value[name], inner)
            elif name in self.fields:
                raise MissingError(inner)


def parse_json(content: bytes) -> Any:
    """JSON as its standard has it: UTF-8, no NaN and no infinite numbers, no key twice, no half characters. Raises
    ValueError, whose text is one line."""
    try:
        document = json.loads(
            content.decode("utf-8"),
            parse_constant=_refuse_constant,
            parse_float=_finite,
            object_pairs_hook=_without_duplicates,
        )
        json.dumps(document, ensure_ascii=False).encode("utf-8")  # half of a surrogate pair has no bytes
        _check_depth(document, DEEPEST)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except UnicodeEncodeError as error:
        raise ValueError("it holds half a character (a lone surrogate)") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 at byte {error.start}") from error
    return document


def _check_depth(value: Any, left: int) -> None:
    if left == 0:
        raise ValueError("it is nested too deeply")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_depth(item, left - 1)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {shortened(digits, quoted=False)} is too large")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shortened(key)} is there twice")
        found[key] = value
    return found
