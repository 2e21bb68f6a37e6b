"""virtual_tokens.npz: what the adapter stream's caches begin with."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from ..errors import ArtifactError
from ..files import VIRTUAL_TOKENS, reason, shown
from ..manifest import Manifest

Array = NDArray[Any]


def read_virtual_tokens(folder: Path, manifest: Manifest) -> dict[str, Array]:
    """layer.part -> (kv_heads, V, head_size) float32. No more is read than the manifest's geometry says, whatever the
    file says about itself. Raises ArtifactError."""
    count = manifest.virtual_tokens.get("adapter", 0)
    if not count:
        return {}
    shapes = {
        f"{index}.{part}.npy": (layer.kv_heads, count, layer.head_size)
        for index, layer in enumerate(manifest.layers)
        for part in ("key", "value")
    }
    path = folder / VIRTUAL_TOKENS
    try:
        found = _read_arrays(path, shapes)
    except Exception as error:  # zipfile, zlib and NumPy have no common type for what is damaged
        raise ArtifactError(f"{shown(path)} cannot be read: {reason(error)}; export it again") from error
    for name, array in found.items():
        if not np.isfinite(array).all():
            raise ArtifactError(f"{shown(path)} holds values in {name} that are not finite; export it again")
    return {name.removesuffix(".npy"): array for name, array in found.items()}


def _read_arrays(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if sorted(names) != sorted(shapes):
            raise ValueError("its arrays are not those of the manifest's layers")
        found = {}
        for name, shape in shapes.items():
            with archive.open(name) as file:
                found[name] = _read_array(file, name, shape)
        return found


def _read_array(file: IO[bytes], name: str, shape: tuple[int, ...]) -> Array:
    """One array in NumPy's format, whose header must say what is wanted before anything is read."""
    version = npy.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"{name} has version {version} of NumPy's format")
    read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    stored, fortran, dtype = read_header(file)
    if stored != shape or fortran or dtype != np.float32:
        order = " in Fortran's order" if fortran else ""
        raise ValueError(f"{name} is {dtype} {list(stored)}{order}, not float32 {list(shape)}")
    size = 4 * int(np.prod(shape, dtype=np.int64))
    content = file.read(size + 1)  # what is one byte too long, or fails its checksum at the end, is damaged too
    if len(content) != size:
        raise ValueError(f"{name} has {'fewer' if len(content) < size else 'more'} values than its header says")
    return np.frombuffer(content, np.float32).reshape(shape)
