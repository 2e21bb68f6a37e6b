"""Room on a disk: foreseen where the size is known, and told in one line where it runs out."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import OutputError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_SAID = re.compile(  # by libraries that hide the number: safetensors, NumPy and onnx_ir, PyTorch
    r"no space left|disk quota exceeded|file too large|requested and \d+ written|pytorchstreamwriter failed", re.I
)


@contextmanager
def room_for(folder: Path, size: int = 0) -> Iterator[None]:
    """Write `size` bytes or more into the draft `folder` in the block. Raises OutputError, with the bytes that are
    needed and those that are free, before the block if these do not fit, and in it where the disk, a quota or a limit
    of file sizes is reached."""
    check_room(folder.parent, size)
    try:
        yield
    except Exception as error:
        if not _is_full(error):
            raise
        written = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        raise OutputError(_told(folder.parent, max(size, written))) from error


def check_room(folder: Path, size: int) -> None:
    """Raise OutputError if the disk of `folder` has less than `size` bytes left."""
    if size > _free(folder):
        raise OutputError(_told(folder, size))


def spelt_bytes(size: float) -> str:
    """A number of bytes for people."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size:.0f} bytes"


def _free(folder: Path) -> float:
    with suppress(OSError):
        return shutil.disk_usage(folder).free
    return float("inf")


def _is_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if not isinstance(error, OutputError) and _SAID.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _told(folder: Path, size: int) -> str:
    free = _free(folder)
    limit = "" if size > free else ", so that a quota or a limit of file sizes is reached"
    return (
        f"no room to write in {folder}: at least {spelt_bytes(size)} needed, {spelt_bytes(free)} free{limit}; "
        "make room there, or give another folder"
    )
