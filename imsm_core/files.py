"""Writing folders whole or not at all."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from .claims import Place, claimed, move_in, refuse_existing, uninterrupted
from .disk import room_for
from .errors import OutputError, OutputExistsError


@contextmanager
def publish_folder(target: Path, marker: str, force: bool = False, size: int = 0) -> Iterator[Path]:
    """Yield an empty folder that takes the name of `target` when the block ends without an exception.

    An interrupted block leaves nothing that looks whole: the folder is removed on an exception, and one left by a
    killed process is removed by the next call for the same target. An existing target stays untouched until the
    new folder is complete; what a symbolic link leads to is replaced, not the link. A target that cannot take another
    folder's name, such as a mount point, is emptied and filled, its marker last.

    What was finished is never lost: if the name cannot be had in the end, the folder stays under one that the message
    gives. size: bytes that will be written at least. marker, force and errors: as `refuse_existing` and `claimed`;
    OutputError if there is no room.
    """
    with claimed(target, marker, force) as place:
        draft = place.numbered("draft")
        draft.mkdir()
        try:
            with room_for(draft, size):
                yield draft
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        with uninterrupted():
            replaced = _publish(draft, place, target, marker, force)
        shutil.rmtree(replaced, ignore_errors=True)


def sha256_of_file(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _publish(draft: Path, place: Place, target: Path, marker: str, force: bool) -> Path:
    """Give the finished draft its name; returns where the folder is that had it before, if there was one."""
    replaced = place.numbered("replaced")
    try:
        refuse_existing(place.folder, marker, force)  # it may have appeared in the meantime
        if place.inside:
            draft = draft.rename(place.numbered("finished"))
            move_in(draft, place.folder, marker)
        elif place.folder.exists():
            place.folder.rename(replaced)
            try:
                draft.rename(place.folder)
            except OSError:
                replaced.rename(place.folder)
                raise
        else:
            draft.rename(place.folder)
    except OutputError as error:
        raise OutputError(f"{error}; what was written is kept in {_kept(draft, place)}") from error
    except OutputExistsError as error:
        raise OutputExistsError(f"{error}; what was written is kept in {_kept(draft, place)}") from error
    except OSError as error:
        why = f"{target} cannot be written: {error.strerror}"
        raise OutputError(f"{why}; what was written is kept in {_kept(draft, place)}") from error
    return replaced


def _kept(draft: Path, place: Place) -> Path:
    """Give the draft a name that people see and nobody tidies up."""
    for number in count(1):
        kept = place.home / f"{place.prefix}.finished-{number}"
        try:
            kept.mkdir()  # its own name: what is renamed takes the place of an empty folder
            return draft.rename(kept)
        except FileExistsError:
            continue
        except OSError:
            return draft
    raise AssertionError("unreachable")
