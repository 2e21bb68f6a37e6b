"""Rows of a data file: JSON objects, one a line or in one array. Knows nothing about their fields or tokens."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import DataError, shown

Row = dict[str, object]
_DECODER = json.JSONDecoder()
_BLANK = " \t\r\n"  # what JSON calls white space


class BadRow(Exception):
    """What is wrong with one row. reason: a few words, the same for all rows with this fault, to count them by."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def read_file(path: Path) -> bytes:
    """A data file's bytes. Raises DataError if it cannot be read or is no file: a pipe would be empty the second time
    it is read, and wait without end for someone who writes."""
    try:
        if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
            raise DataError(f"cannot read the data file {path}: it is not a regular file")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the data file {path}: {error.strerror}") from error
    except ValueError as error:  # a name with a zero byte
        raise DataError(f"cannot read the data file {shown(path)}: {error}") from error


def rows(content: bytes, path: Path) -> Iterator[tuple[int, Row | BadRow]]:
    """Every row of a data file with its line number: the line on which it begins. Raises DataError for a file that is
    not text in UTF-8, and for an array that does not end or goes on after a fault."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    return _array(text, path) if text.startswith("[", _skip_blank(text, 0)) else _lines(text)


def _lines(text: str) -> Iterator[tuple[int, Row | BadRow]]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON text may hold U+2028
        if line.strip():
            yield number, _parsed(line)


def _parsed(line: str) -> Row | BadRow:
    try:
        return _object(json.loads(line))
    except json.JSONDecodeError as error:
        return BadRow("not JSON", f"it is not JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, a thousand brackets
        return BadRow("not JSON", f"it cannot be read: {error}")


def _array(text: str, path: Path) -> Iterator[tuple[int, Row | BadRow]]:
    """The elements of an array, decoded one after the other, so that each has its line."""
    place = _skip_blank(text, 0) + 1
    number, counted = 1, 0
    first = True
    while True:
        place = _skip_blank(text, place)
        number, counted = number + text.count("\n", counted, place), place
        if text[place : place + 1] == "]" and first:
            break
        try:
            value, place = _DECODER.raw_decode(text, place)
        except (ValueError, RecursionError) as error:  # as in _parsed; the array cannot be followed any further
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            at = error.lineno if isinstance(error, json.JSONDecodeError) else number
            raise DataError(f"{path}, line {at}: the array of rows is not JSON: {reason}") from error
        yield number, _object(value)
        first = False
        place = _skip_blank(text, place)
        found = text[place : place + 1]
        if found == "]":
            break
        if found != ",":
            number += text.count("\n", counted, place)
            what = f"{found!r} stands" if found else "the file ends"
            raise DataError(f"{path}, line {number}: the array of rows is not JSON: {what} where ',' or ']' must")
        place += 1
    end = _skip_blank(text, place + 1)
    if end < len(text):
        number += text.count("\n", counted, end)
        raise DataError(f"{path}, line {number}: there is more after the array of rows")


def _skip_blank(text: str, place: int) -> int:
    while place < len(text) and text[place] in _BLANK:
        place += 1
    return place


def _object(value: Any) -> Row | BadRow:
    if not isinstance(value, dict):
        return BadRow("not a JSON object", f"it is {kind_of(value)}, not a JSON object")
    return value


def kind_of(value: object) -> str:
    """What JSON calls a value's type."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    kinds: dict[type, str] = {str: "text", dict: "an object", list: "a list"}
    return kinds.get(type(value), "a number")
