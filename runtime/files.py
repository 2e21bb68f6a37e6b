"""The files of an artifact's folder: their names, reading them without waiting for what is no file, and writing a file
whole or not at all."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ArtifactError
from .printable import printable

MANIFEST, GRAPH, DATA = "imsm_model.json", "model.onnx", "model.onnx.data"
TOKENIZER, CHAT_TEMPLATE, VIRTUAL_TOKENS = "tokenizer.json", "chat_template.jinja", "virtual_tokens.npz"
READ = (GRAPH, DATA, TOKENIZER, CHAT_TEMPLATE, VIRTUAL_TOKENS)
"""Files that are read where they are there, so that the manifest must name them."""


def size_of_file(path: Path) -> int:
    """Bytes of a regular file, or of the one that a link leads to. Raises ArtifactError for anything else: opening a
    pipe waits for whoever writes into it."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ArtifactError(f"{shown(path.parent)} has no {printable(path.name)}; export it again") from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{shown(path)} cannot be read: {reason(error)}") from error
    if not stat.S_ISREG(status.st_mode):
        raise ArtifactError(f"{shown(path)} is not a regular file")
    return status.st_size


def read_file(path: Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes. Raises ArtifactError."""
    size = size_of_file(path)
    if size > most:
        raise ArtifactError(f"{shown(path)} has {size} bytes; such a file has at most {most}")
    try:
        with path.open("rb") as file:
            return file.read(most)
    except OSError as error:
        raise ArtifactError(f"{shown(path)} cannot be read: {reason(error)}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield an empty file beside `path`, which takes its name when the block ends without an exception, and is removed
    otherwise. Raises OSError."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    draft = Path(name)
    try:
        yield draft
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def shown(path: Path) -> str:
    """A path on one line."""
    return printable(str(path))


def reason(error: Exception) -> str:
    """Why something failed, on one line: what the system says, without the path."""
    told = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return printable(" ".join(told.split())) or type(error).__name__
