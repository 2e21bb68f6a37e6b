"""imsm.json and gate.safetensors: every damaged one is refused in one line."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from imsm_core.checkpoint import _load_gate, read_info
from imsm_core.errors import CheckpointError
from imsm_core.foreign import load_gate
from tests.contract.test_mutations import mutated
from tests.exported import Exported


def copied(tiny: Exported, tmp_path: Path) -> Path:
    target = tmp_path / "checkpoint"
    shutil.copytree(tiny.checkpoint, target)
    return target


def damaged(content: bytes, count: int) -> list[bytes]:
    """`count` versions with some bytes replaced or cut off."""
    generator, found = random.Random(0), []
    for _ in range(count):
        changed = bytearray(content)
        for _ in range(generator.choice((1, 1, 4, 40))):
            changed[generator.randrange(len(changed))] = generator.randrange(256)
        if generator.random() < 0.3:
            del changed[generator.randrange(len(changed)) :]
        found.append(bytes(changed))
    return found


def test_every_changed_imsm_json_is_refused_in_one_line_or_has_the_right_types(tiny: Exported, tmp_path: Path) -> None:
    folder = copied(tiny, tmp_path)
    path = folder / "imsm.json"
    document = json.loads(path.read_text())
    contents = [json.dumps(changed).encode() for _, changed in mutated(document)]
    contents += damaged(path.read_bytes(), 300)
    contents += [b"[" * 200_000, b"\xff", b"", b"5", b"null", b"[]", b'{"format_version": NaN}']
    contents += [b'{"format_version": ' + b"9" * 5000 + b"}", b'{"format_version": 1, "\\u001b": 1}']
    refused: list[str] = []
    for content in contents:
        path.write_bytes(content)
        try:
            info = read_info(folder)
        except CheckpointError as error:
            refused.append(str(error))
            continue
        assert type(info.gate_rank) is int
        assert info.gate_rank >= 0
        assert all(isinstance(value, str) for value in (info.base_model, info.base_fingerprint, info.gate_kind))
    assert len(refused) > 300
    assert all(line.isprintable() for line in refused)


@pytest.mark.parametrize("load", [_load_gate, load_gate])
def test_every_damaged_gate_is_refused_in_one_line_or_is_a_gate(
    tiny: Exported, tmp_path: Path, load: Callable[..., object]
) -> None:
    folder = copied(tiny, tmp_path)
    info, path = read_info(folder), folder / "gate.safetensors"
    refused: list[str] = []
    for content in [*damaged(path.read_bytes(), 300), b"", b"\xff" * 8, b"\x00" * 8, b"\xff" * 7 + b"\x00" * 99]:
        path.write_bytes(content)
        try:
            load(path, info, 32) if load is _load_gate else load(path, info.gate_kind, 32)
        except CheckpointError as error:
            refused.append(str(error))
    assert len(refused) > 30
    assert all(line.isprintable() for line in refused)


def test_a_pipe_in_a_files_place_is_refused_and_not_waited_for(tiny: Exported, tmp_path: Path) -> None:
    folder = copied(tiny, tmp_path)
    (folder / "imsm.json").unlink()
    os.mkfifo(folder / "imsm.json")
    with pytest.raises(CheckpointError, match=r"imsm\.json is not a regular file"):
        read_info(folder)
