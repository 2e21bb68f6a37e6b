"""Rows of JSON, one a line, in and out of commands: where a row is wrong, whole rows or none, and how far it is.

`read_rows` tells a row's line with every mistake, and so does what runs in `at_line`; `RowWriter` writes a row as soon
as it is there; `Progress` shows on a terminal how far the work is.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from ..errors import PromptError, SettingsError
from ..json_checks import parse_json

Prepared = TypeVar("Prepared")
STANDARD = Path("-")
"""stdin or stdout instead of a file."""
_REDRAW = 0.1  # seconds


class Row(NamedTuple):
    """What stands on a line, counted from 1. error: why it is nothing; None where it is JSON."""

    line: int
    value: Any
    error: PromptError | None = None


def add_files(parser: argparse.ArgumentParser, reads: str, writes: str) -> None:
    """Add --input and --output, which are stdin and stdout unless said. reads, writes: what is in them."""
    for option, text, stream in (("--input", reads, "stdin"), ("--output", writes, "stdout")):
        parser.add_argument(option, type=Path, default=STANDARD, metavar="FILE", help=f"{text}; - is {stream}")


def read_rows(path: Path, check: Callable[[Any], None]) -> list[Row]:
    """All rows of a file in JSON Lines, or of stdin for "-", in UTF-8; blank lines are none. check: raises PromptError
    for a row that is of no use. Raises PromptError with the line for what is no JSON and for what `check` raises, for a
    file without rows, and OSError."""
    found = parse_rows(path, read_content(path))
    for row in found:
        with at_line(row.line):
            if row.error is not None:
                raise row.error
            check(row.value)
    return found


def prepare_rows(rows: Sequence[Row], prepare: Callable[[Any], Prepared]) -> list[Prepared]:
    """What `prepare` makes of every row's value; a PromptError of it tells the row's line."""
    made = []
    for row in rows:
        with at_line(row.line):
            made.append(prepare(row.value))
    return made


def read_content(path: Path) -> bytes:
    """What a file holds, or stdin for "-". Raises OSError."""
    if path != STANDARD:
        return path.read_bytes()
    return b"" if sys.stdin is None else sys.stdin.buffer.read()


def parse_rows(path: Path, content: bytes) -> list[Row]:
    """All rows of the content of a file, those that are no JSON too. Raises PromptError where there are none."""
    lines = enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1)
    found = [_parsed(number, text) for number, text in lines if text.strip()]
    if not found:
        raise PromptError(f"{_named(path, 'stdin')} has no rows")
    return found


def _parsed(number: int, text: bytes) -> Row:
    try:
        return Row(number, parse_json(text))
    except json.JSONDecodeError as error:
        return Row(number, None, PromptError(f"it is no JSON: {error.msg} at character {error.pos + 1}"))
    except ValueError as error:
        return Row(number, None, PromptError(f"it is no JSON: {error}"))


@contextmanager
def at_line(number: int) -> Iterator[None]:
    """A PromptError of the block tells the line of its row."""
    try:
        yield
    except PromptError as error:
        raise PromptError(f"line {number}: {error}") from error


class RowWriter:
    """Writes rows to a file, or to stdout for "-", each at once: what another program reads are whole rows, and where
    the disk is full the file ends with the last one that fits. Opening it empties the file unless rows are appended;
    so read the input first."""

    def __init__(self, path: Path, append: bool = False) -> None:
        """Raises SettingsError if there is no such folder, and OSError if the file cannot be written."""
        if path != STANDARD and not path.absolute().parent.is_dir():
            raise SettingsError("output", path, "its folder does not exist")
        mode = "ab" if append else "wb"
        self._file: IO[bytes] | None = None if path == STANDARD else open(path, mode, buffering=0)  # noqa: SIM115
        self._path = path

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, row: Any) -> None:
        """Write one row, as ASCII. Raises OSError."""
        text = json.dumps(row, allow_nan=False) + "\n"
        if self._file is None:
            print(text, end="", flush=True)
            return
        before, data = self._file.tell() if self._file.seekable() else None, text.encode("ascii")
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            if before is not None:
                self._file.truncate(before)
            raise OSError(error.errno, error.strerror, str(self._path)) from error


def check_apart(source: Path, target: Path) -> None:
    """Raise SettingsError where a command would write into the file that it reads."""
    if STANDARD not in (source, target) and target.exists() and os.path.samefile(source, target):
        raise SettingsError("output", target, "it is the file that is read ({input})")


class Progress:
    """A line on stderr that tells how much of the work is done and how long the rest takes; nothing where stderr is no
    terminal. total: of anything that takes time in proportion, such as tokens."""

    def __init__(self, rows: int, total: int) -> None:
        self._rows, self._total = rows, max(total, 1)
        self._shown = sys.stderr.isatty()
        self._begin = self._last = time.monotonic()
        self._done = self._count = 0
        self._width = 0

    def advance(self, amount: int) -> None:
        """A row is done, and `amount` of the total."""
        self._done, self._count, now = self._done + amount, self._count + 1, time.monotonic()
        if not self._shown or (now - self._last < _REDRAW and self._count < self._rows):
            return
        self._last = now
        left = (now - self._begin) * (self._total - self._done) / max(self._done, 1)
        self._draw(f"{self._count} of {self._rows} rows, {self._done / self._total:.0%}, {_duration(left)} left")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            self._draw("")
            print("\r", end="", file=sys.stderr, flush=True)

    def _draw(self, line: str) -> None:
        print("\r" + line.ljust(self._width), end="", file=sys.stderr, flush=True)
        self._width = len(line)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _named(path: Path, standard: str) -> str:
    return standard if path == STANDARD else str(path)
