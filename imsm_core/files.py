"""Writing folders whole or not at all."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import OutputError, OutputExistsError, setting


@contextmanager
def publish_folder(target: Path, marker: str, force: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `target` that takes its name when the block ends without an exception.

    An interrupted block leaves nothing that looks whole: the folder is removed on an exception, and one left by a
    killed process is removed by the next call for the same target. An existing target stays untouched until the
    new folder is complete. marker, force and errors: as `refuse_existing`.
    """
    if target.parent.is_dir():
        _clear_abandoned(target)
    refuse_existing(target, marker, force)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.draft-{os.getpid()}")
    draft.mkdir()
    try:
        yield draft
        if target.exists():
            replaced = target.with_name(f".{target.name}.replaced-{os.getpid()}")
            target.rename(replaced)
            draft.rename(target)
            shutil.rmtree(replaced)
        else:
            draft.rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def refuse_existing(target: Path, marker: str, force: bool) -> None:
    """Raise OutputExistsError if `target` exists and may not be replaced, OutputError if it cannot be written: before
    the long work, not after it. `force` replaces only an empty folder or one that holds the file `marker`, so that a
    mistyped name costs nobody's work."""
    if target.exists() and not force:
        raise OutputExistsError(f"{target} exists and is kept; give another name, or {setting('force')} to replace it")
    if target.exists() and not target.is_dir():
        raise OutputExistsError(f"{target} is a file, not a folder; give another name")
    if target.exists() and any(target.iterdir()) and not (target / marker).is_file():
        raise OutputExistsError(
            f"{target} is kept: it has no {marker}, and {setting('force')} replaces only what this program wrote"
        )
    parent = next(folder for folder in target.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise OutputError(f"{target} cannot be written: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{target} cannot be written: no permission to write in {parent}")


def sha256_of_file(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _clear_abandoned(target: Path) -> None:
    """Remove what killed processes left; a folder that was moved aside when its successor did not arrive comes back."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(draft|replaced)-(\d+)")
    for path in sorted(target.parent.iterdir()):
        match = pattern.fullmatch(path.name)
        if match is None or (int(match[2]) != os.getpid() and Path("/proc", match[2]).exists()):
            continue  # this process's own number is abandoned too: a container reuses them
        if match[1] == "replaced" and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)
