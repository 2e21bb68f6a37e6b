"""Output folders while they are written: where the work lies until then, and whose it is.

Drafts lie beside their target, under its name: .NAME.lock, .NAME.draft-N, .NAME.replaced-N. A target that cannot take
another folder's name (a mount point, the current folder, a folder in one that is closed) has them inside: .imsm.lock,
.imsm.draft-N, and .imsm.finished-N while the files of a draft are moved up.

Process numbers say nothing across containers. Who holds the lock owns the target, and every draft of it that is there
then was abandoned.
"""

from __future__ import annotations

import errno
import os
import platform
import re
import secrets
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from filelock import FileLock, Timeout, UnixFileLock

from .errors import OutputError, OutputExistsError, setting

_INSIDE = "imsm"
_NOBODYS = re.compile(rf"\.{_INSIDE}\..+|{_INSIDE}\.partial|lost\+found")
"""What a folder may hold and yet be empty: our own work, and what a file system puts at its root."""
_REFUSED_ONLY_BY_WHAT_IS_THERE = {errno.ENOTEMPTY, errno.EEXIST}


@dataclass(frozen=True)
class Place:
    """folder: the target without symbolic links, which is what is written. inside: whether drafts lie in it."""

    folder: Path
    inside: bool

    @property
    def home(self) -> Path:
        """Where drafts lie."""
        return self.folder if self.inside else self.folder.parent

    @property
    def prefix(self) -> str:
        """What the names of drafts begin with, after a dot."""
        return _INSIDE if self.inside else self.folder.name

    def own(self, what: str) -> Path:
        """The path of something of ours."""
        return self.home / f".{self.prefix}.{what}"

    def numbered(self, what: str) -> Path:
        """... of this process."""
        return self.own(f"{what}-{os.getpid()}")

    def left(self, what: str) -> list[Path]:
        """... that is there."""
        pattern = re.compile(rf"\.{re.escape(self.prefix)}\.{what}-\d+")
        return sorted(path for path in self.home.iterdir() if pattern.fullmatch(path.name))


def find_place(target: Path) -> Place:
    """Where `target` is written. Raises OutputError if it cannot be."""
    folder = Path(os.path.realpath(target))
    if folder.is_symlink():
        raise OutputError(f"{target} cannot be written: its symbolic link leads back to itself")
    if target.is_symlink() and not folder.parent.is_dir():
        raise OutputError(f"{target} is a symbolic link to {folder}, and there is no folder {folder.parent}")
    parent = next(above for above in folder.parents if above.exists()) if folder != folder.parent else folder
    if not parent.is_dir():
        raise OutputError(f"{target} cannot be written: {parent} is not a folder")
    inside = folder.is_dir() and (
        os.path.ismount(folder) or _is_current(folder) or not _open(parent) or not _can_be_renamed(folder)
    )
    closed = folder if inside else parent
    if not _open(closed):
        raise OutputError(f"{target} cannot be written: no permission to write in {closed}")
    return Place(folder, inside)


def refuse_existing(target: Path, marker: str, force: bool) -> None:
    """Raise OutputExistsError if `target` exists and may not be replaced, OutputError if it cannot be written: before
    the long work, not after it. `force` replaces only an empty folder or one that holds the file `marker`, so that a
    mistyped name costs nobody's work."""
    if target.exists() and not force:
        raise OutputExistsError(f"{target} exists and is kept; give another name, or {setting('force')} to replace it")
    if target.exists() and not target.is_dir():
        raise OutputExistsError(f"{target} is a file, not a folder; give another name")
    if target.exists() and contents(target) and not (target / marker).is_file():
        raise OutputExistsError(
            f"{target} is kept: it has no {marker}, and {setting('force')} replaces only what this program wrote"
        )
    find_place(target)


@contextmanager
def claimed(target: Path, marker: str, force: bool = False, inputs: Iterable[object] = ()) -> Iterator[Place]:
    """Own `target` in the block, which may be the whole of the long work: a second process that wants it is refused.
    What killed processes left is tidied up. May be nested.

    inputs: paths that the work reads, and other things, which are ignored. Raises OutputError if another process has
    `target`, if an input lies in it or if it cannot be written, and as `refuse_existing`.
    """
    place = find_place(target)
    _refuse_inputs(target, place.folder, inputs)
    with _parents_of(place.home), _locked(target, place):
        _tidy_up(place, marker)
        refuse_existing(target, marker, force)
        yield place


def move_in(finished: Path, folder: Path, marker: str, replace: bool = True) -> None:
    """Move the files of `finished` up into `folder`, the marker last, so that a folder with it is whole. replace:
    whether what is there is removed first."""
    (folder / marker).unlink(missing_ok=True)
    for path in contents(folder) if replace else []:
        remove(path)
    for path in sorted(finished.iterdir(), key=lambda path: (path.name == marker, path.name)):
        remove(folder / path.name)
        path.rename(folder / path.name)
    finished.rmdir()


def contents(folder: Path) -> list[Path]:
    """What is in a folder and not ours."""
    return [path for path in folder.iterdir() if not _NOBODYS.fullmatch(path.name)]


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Signals that would end the program take effect after the block. Only Python's main thread can have them wait."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []

    def wait(number: int, frame: FrameType | None) -> None:
        waiting.append(number)

    before = {number: signal.signal(number, wait) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for late in waiting[:1]:
            signal.raise_signal(late)


@contextmanager
def _locked(target: Path, place: Place) -> Iterator[None]:
    path = place.own("lock")
    lock = FileLock(path, is_singleton=True)  # one object, so that claims of this thread nest
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        with suppress(OSError):
            owner = path.read_text(encoding="utf-8", errors="replace").strip()
        message = f"{target} is being written by {owner or 'another process'}; wait for it, or give another name"
        raise OutputError(message) from error
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {path}: {error.strerror}") from error
    try:
        if isinstance(lock, UnixFileLock):  # elsewhere the lock keeps others from reading it, or says this itself
            path.write_text(f"process {os.getpid()} on {platform.node()}\n", encoding="utf-8")
        yield
    finally:
        if lock.lock_counter == 1:
            with suppress(OSError):  # before it is given up: whoever opened it notices that it is gone
                path.unlink()
        lock.release()


@contextmanager
def _parents_of(folder: Path) -> Iterator[None]:
    """Make `folder` for the block; what is empty after it goes again."""
    made = [above for above in (folder, *folder.parents) if not above.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with suppress(OSError):  # not empty
            for above in made:
                above.rmdir()


def _tidy_up(place: Place, marker: str) -> None:
    """Remove drafts that killed processes left. A folder that was moved aside comes back if its successor did not
    arrive; files that were being moved up arrive."""
    for path in place.left("finished"):
        move_in(path, place.folder, marker, replace=False)
    for path in place.left("replaced"):
        if not place.folder.exists():
            path.rename(place.folder)
    for path in place.left("(draft|replaced)"):
        shutil.rmtree(path, ignore_errors=True)


def _refuse_inputs(target: Path, folder: Path, inputs: Iterable[object]) -> None:
    for path in inputs:
        if isinstance(path, str | Path) and os.path.exists(path):
            real = Path(os.path.realpath(path))
            if folder in (real, *real.parents):
                raise OutputError(f"{target} holds {path}, which is read; give another name")


def _open(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK)


def _is_current(folder: Path) -> bool:
    """Whether someone stands in it: this process, and so the shell that started it."""
    try:
        current = Path.cwd()
    except OSError:  # it was deleted
        return False
    return folder in (current, *current.parents)


def _can_be_renamed(folder: Path) -> bool:
    """Whether the system would give a folder another name: told by the reason why it does not give it that of a folder
    with something in it, which it never does."""
    probe = folder.parent / f".{folder.name}.probe-{secrets.token_hex(4)}"
    with uninterrupted():
        try:
            (probe / "something").mkdir(parents=True)
            os.rename(folder, probe)
        except OSError as error:
            shutil.rmtree(probe, ignore_errors=True)
            return error.errno in _REFUSED_ONLY_BY_WHAT_IS_THERE
        os.rename(probe, folder)  # somebody emptied it
    return True
