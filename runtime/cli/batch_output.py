"""The output of `batch`: rows that are there stay, whenever the run before was ended."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from ..errors import SettingsError
from ..json_checks import parse_json
from .rows import RowWriter

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class Output:
    """A file of rows and, beside it, FILE.state.json, which says what it is of. done: the keys of its rows."""

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, str],
        key_of: Callable[[Mapping[str, Any]], Any],
        is_error: Callable[[Mapping[str, Any]], bool],
        overwrite: bool = False,
    ) -> None:
        """Look at what is there; nothing is changed before `begin`. identity: what the rows are of, by what it is
        called. key_of: the key of a row; None for what is none. is_error: whether a row tells of an error. Raises
        SettingsError for a file that belongs to something else or to another run that goes on, unless it is to be
        overwritten, and OSError."""
        if not path.absolute().parent.is_dir():
            raise SettingsError("output", path, "its folder does not exist")
        if str(path) == "-":
            raise SettingsError("output", path, "it must be a file, which a run that was ended goes on with")
        self._path, self._identity, self._key_of, self._is_error = path, dict(identity), key_of, is_error
        self._state = path.with_name(path.name + ".state.json")
        self._lock = _locked(path)
        self._whole = 0  # bytes of whole rows
        self.done: set[Any] = set()
        self.failed = 0  # of those
        try:
            if not overwrite and path.stat().st_size:
                self._check_state()
                self._read()
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def begin(self) -> RowWriter:
        """What rows are written with, after those that are there; half a row at the end is cut off."""
        os.truncate(self._path, self._whole)
        if not self._whole:
            part = self._state.with_name(self._state.name + ".part")
            part.write_text(json.dumps(self._identity) + "\n", encoding="utf-8")
            part.replace(self._state)
        return RowWriter(self._path, append=True)

    def _check_state(self) -> None:
        try:
            found = parse_json(self._state.read_bytes())
        except (OSError, ValueError):
            found = None
        if not isinstance(found, dict):
            rule = f"it exists, and {self._state.name} does not say what it is of; take another name, or {{overwrite}}"
            raise SettingsError("output", self._path, rule)
        for name, value in self._identity.items():
            if found.get(name) != value:
                rule = f"it is of another {name}; take another name, or {{overwrite}}"
                raise SettingsError("output", self._path, rule)

    def _read(self) -> None:
        with self._path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    return
                key, row = None, None
                with suppress(ValueError, AttributeError):
                    row = parse_json(line)
                    key = self._key_of(row)
                if key is None or row is None:
                    rule = f"its line {number} is no row of a batch; take another name, or {{overwrite}}"
                    raise SettingsError("output", self._path, rule)
                self.done.add(key)
                self.failed += self._is_error(row)
                self._whole += len(line)


def _locked(path: Path) -> IO[bytes]:
    """The file, made if it is not there, and locked until it is closed."""
    file = path.open("ab")
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise SettingsError("output", path, "another run is writing it") from error
        except OSError:  # a file system without locks
            pass
    return file
