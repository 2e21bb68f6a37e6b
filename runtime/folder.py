"""An artifact's folder against its manifest: every file that is read is one that the manifest names, as it names it."""

from __future__ import annotations

import hashlib
import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path

from .errors import ArtifactError
from .files import GRAPH, MANIFEST, READ, reason, shown, size_of_file
from .manifest import Manifest
from .printable import printable

_LOCATION = re.compile(rb"\x0a\x08location\x12")
"""How an entry of a tensor's `external_data` begins whose key is `location`, as protobuf writes it."""


def check_files(folder: Path, manifest: Manifest, hashes: bool) -> None:
    """Every file that the manifest names is a regular file (or leads to one) and has the right size and, with `hashes`,
    the right sha256; and no other file would be read.

    Raises ArtifactError naming the first file that is not as it must be.
    """
    for name in unlisted_files(folder, manifest):
        if name.casefold() in READ:
            raise ArtifactError(f"{shown(folder)} has {printable(name)}, which its {MANIFEST} does not name; remove it")
    for name, entry in manifest.files.items():
        path = folder / name
        size = size_of_file(path)
        if size != entry.bytes:
            raise ArtifactError(f"{shown(path)} has {size} bytes, not {entry.bytes}: it is truncated or was replaced")
        if hashes and _sha256(path) != entry.sha256:
            raise ArtifactError(f"{shown(path)} was changed: its sha256 differs from the manifest's")
    for name in _data_files(folder / GRAPH):
        if name not in manifest.files:
            raise ArtifactError(
                f"{shown(folder / GRAPH)} has weights in {printable(name)}, which {MANIFEST} does not name"
            )


def unlisted_files(folder: Path, manifest: Manifest) -> list[str]:
    """What lies in the folder beside the manifest and the files that it names. Raises ArtifactError."""
    try:
        return sorted(set(os.listdir(folder)) - manifest.files.keys() - {MANIFEST})
    except OSError as error:
        raise ArtifactError(f"{shown(folder)} cannot be read: {reason(error)}") from error


def _data_files(graph: Path) -> Iterator[str]:
    """The files that hold the weights of a graph, by the graph itself. onnxruntime lets none of them be outside of the
    folder; a byte sequence that only looks like such a name is refused with them."""
    try:
        with graph.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            starts = [match.end() for match in _LOCATION.finditer(content)]
            places = sorted({bytes(content[start + 1 : start + 1 + content[start]]) for start in starts})
    except (OSError, ValueError, IndexError) as error:  # an empty file cannot be mapped
        raise ArtifactError(f"{shown(graph)} cannot be read: {reason(error)}") from error
    yield from (place.decode("utf-8", "backslashreplace") for place in places)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactError(f"{shown(path)} cannot be read: {reason(error)}") from error
