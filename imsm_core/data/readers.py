"""Rows and their text fields from data files. Knows nothing about tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from ..errors import DataError


def rows(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """Every JSON object of a JSONL file with its line number. Raises DataError for what cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: JSON text may hold U+2028
    except OSError as error:
        raise DataError(f"cannot read the data file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number} is not JSON: {error.msg} at column {error.colno}") from error
        except (ValueError, RecursionError) as error:  # a number of 5,000 digits, a thousand brackets
            raise DataError(f"{path}, line {number} cannot be read: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number} is {type(row).__name__}, not a JSON object")
        yield number, row


def text_field(row: dict[str, object], field: str, path: Path, number: int) -> str:
    """The text in one field of line `number`. Raises DataError if it is not there, or not text."""
    if field not in row:
        raise DataError(f"{path}, line {number} has no field {field!r}; it has {', '.join(map(repr, row)) or 'none'}")
    value = row[field]
    if not isinstance(value, str):
        raise DataError(f"{path}, line {number}: field {field!r} is {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{path}, line {number}: field {field!r} is not Unicode text: {error.reason}") from error
    return value
