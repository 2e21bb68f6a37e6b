"""virtual_tokens.npz: read as the manifest describes it, or refused in one line, however it is damaged."""

from __future__ import annotations

import io
import random
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.engine.virtual_tokens import read_virtual_tokens
from runtime.errors import ArtifactError
from runtime.manifest import LayerCache, Manifest, read_manifest
from tests.exported import Exported

SHAPE = (2, 3, 8)
NAMES = ["0.key", "0.value", "1.key", "1.value"]


@pytest.fixture
def manifest(tiny: Exported) -> Manifest:
    layers = (LayerCache(2, 8, ("both",)),) * 2
    return replace(read_manifest(tiny.artifact), virtual_tokens={"base": 0, "adapter": 3}, layers=layers)


def arrays() -> dict[str, Any]:
    generator = np.random.default_rng(0)
    return {name: generator.standard_normal(SHAPE).astype(np.float32) for name in NAMES}


def packed(found: dict[str, Any], compressed: bool = False) -> bytes:
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, **found)
    return file.getvalue()


@pytest.mark.parametrize("compressed", [False, True])
def test_what_the_manifest_describes_is_read(manifest: Manifest, tmp_path: Path, compressed: bool) -> None:
    (tmp_path / "virtual_tokens.npz").write_bytes(packed(arrays(), compressed))
    found = read_virtual_tokens(tmp_path, manifest)
    assert sorted(found) == NAMES
    for name, array in arrays().items():
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("0.key", np.zeros(SHAPE, np.float64), "0.key.npy is float64"),
        ("0.key", np.zeros(SHAPE, ">f4"), "0.key.npy is >f4"),
        ("0.key", np.zeros(SHAPE, np.complex64), "0.key.npy is complex64"),
        ("0.key", np.zeros(SHAPE, [("a", "f4")]), "0.key.npy is "),
        ("0.key", np.full(SHAPE, None, object), "0.key.npy is object"),
        ("0.key", np.asfortranarray(np.zeros(SHAPE, np.float32)), "in Fortran's order"),
        ("0.key", np.zeros((2, 4, 8), np.float32), r"0.key.npy is float32 \[2, 4, 8\], not float32 \[2, 3, 8\]"),
        ("0.key", np.zeros((), np.float32), r"0.key.npy is float32 \[\]"),
        ("0.key", np.full(SHAPE, np.nan, np.float32), "not finite"),
        ("1.value", np.full(SHAPE, np.inf, np.float32), "not finite"),
        ("2.key", np.zeros(SHAPE, np.float32), "not those of the manifest's layers"),
    ],
    ids=str,
)
def test_other_arrays_are_refused(manifest: Manifest, tmp_path: Path, name: str, array: Any, message: str) -> None:
    (tmp_path / "virtual_tokens.npz").write_bytes(packed(arrays() | {name: array}))
    with pytest.raises(ArtifactError, match=message):
        read_virtual_tokens(tmp_path, manifest)


def test_a_header_that_promises_more_than_there_should_be_reserves_nothing(manifest: Manifest, tmp_path: Path) -> None:
    huge = packed({"x": np.zeros(1, np.float32)})
    header = zipfile.ZipFile(io.BytesIO(huge)).read("x.npy").replace(b"(1,), }     ", b"(2**40,), }" + b" ")
    header = header.replace(b"2**40", b"99999")
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name in NAMES:
            archive.writestr(f"{name}.npy", header)
    (tmp_path / "virtual_tokens.npz").write_bytes(target.getvalue())
    with pytest.raises(ArtifactError, match=r"0.key.npy is float32 \[99999\]"):
        read_virtual_tokens(tmp_path, manifest)


def test_a_bomb_is_not_unpacked(manifest: Manifest, tmp_path: Path) -> None:
    content = io.BytesIO()
    np.save(content, np.zeros(SHAPE, np.float32))
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in NAMES:
            archive.writestr(f"{name}.npy", content.getvalue() + b"\x00" * 2**24)
    (tmp_path / "virtual_tokens.npz").write_bytes(target.getvalue())
    with pytest.raises(ArtifactError, match=r"0\.key\.npy has more values than its header says"):
        read_virtual_tokens(tmp_path, manifest)


def test_every_damaged_file_is_refused_in_one_line_or_reads_as_before(manifest: Manifest, tmp_path: Path) -> None:
    path, generator = tmp_path / "virtual_tokens.npz", random.Random(0)
    refused: list[str] = []
    for compressed in (False, True):
        whole = packed(arrays(), compressed)
        for _ in range(400):
            content = bytearray(whole)
            for _ in range(generator.choice((1, 1, 4, 40))):
                content[generator.randrange(len(content))] = generator.randrange(256)
            if generator.random() < 0.3:
                del content[generator.randrange(len(content)) :]
            path.write_bytes(content)
            try:
                found = read_virtual_tokens(tmp_path, manifest)
            except ArtifactError as error:
                refused.append(str(error))
                continue
            assert all((found[name] == array).all() for name, array in arrays().items())
    assert len(refused) > 400
    assert all(line.isprintable() for line in refused)
