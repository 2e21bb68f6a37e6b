"""An export as a whole: what it refuses, and that it publishes all or nothing."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from export.errors import VerificationError
from export.pipeline import export_checkpoint
from export.settings import ExportSettings
from export.trace import _kept_interrupt
from export.verification.parity import verify_graph
from imsm_core.checkpoint import load_checkpoint
from imsm_core.errors import BaseModelError, OutputExistsError, SettingsError
from tests.builders import make_base_folder
from tests.exported import Exported, export_tiny
from tests.measured import check_memories_apart

ROOT = Path(__file__).resolve().parents[2]


def quiet(line: str) -> None:
    pass


def test_an_existing_folder_is_kept_without_force(tiny: Exported, tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="exists and is kept"):
        export_checkpoint(tiny.checkpoint, target, report=quiet)
    assert (target / "mine.txt").read_text() == "mine"


def test_an_unknown_precision_is_named() -> None:
    with pytest.raises(SettingsError, match="precision is fp7; choose one of fp32, fp16, bf16, int8, int4"):
        ExportSettings(precision="fp7")


def test_another_base_model_is_refused_by_its_fingerprint(tiny: Exported, tmp_path: Path) -> None:
    other = make_base_folder(tmp_path / "other", seed=5)
    with pytest.raises(BaseModelError, match="is not the base model of"):
        export_checkpoint(tiny.checkpoint, tmp_path / "artifact", base_model=str(other), report=quiet)
    assert not (tmp_path / "artifact").exists()


def test_the_parity_check_notices_another_adapter(tiny: Exported) -> None:
    model, _ = load_checkpoint(tiny.checkpoint)
    with torch.no_grad():
        next(parameter for name, parameter in model.named_parameters() if "lora_B" in name)[0, 0] += 0.5
    with pytest.raises(VerificationError, match="hidden_adapter in prefill is off by"):
        verify_graph(tiny.artifact, model, ("base", "adapter"), 128)


def test_the_parity_check_notices_another_gate(tiny: Exported) -> None:
    model, _ = load_checkpoint(tiny.checkpoint)
    with torch.no_grad():
        model.gate.get_parameter("gate_up.weight")[0, 0] += 0.5
    with pytest.raises(VerificationError, match="gate in prefill is off by"):
        verify_graph(tiny.artifact, model, ("base", "adapter"), 128)


def test_an_export_that_fails_its_verification_publishes_nothing(
    tiny: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.verification.parity.FP32_TOLERANCE", 1e-12)
    monkeypatch.setattr("export.verification.parity.ROUNDING_FACTOR", 0)
    with pytest.raises(VerificationError):
        export_checkpoint(tiny.checkpoint, tmp_path / "artifact", report=quiet)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("kill", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_an_interrupted_export_leaves_nothing_that_looks_whole(
    tiny: Exported, tmp_path: Path, kill: signal.Signals, code: int
) -> None:
    target = tmp_path / "artifact"
    command = [sys.executable, "cli.py", "export", str(tiny.checkpoint), str(target)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("trace"):
                break
        time.sleep(0.5)
        process.send_signal(kill)
        rest = process.stderr.read()
    assert process.returncode == code
    assert "Traceback" not in rest
    assert not target.exists()
    if kill == signal.SIGINT:
        assert list(tmp_path.iterdir()) == []


def test_a_ctrl_c_that_a_callback_drops_is_raised_after_the_trace() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), _kept_interrupt(), contextlib.suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_base_only_export_has_one_stream_and_no_gate(tmp_path: Path) -> None:
    exported = export_tiny(tmp_path, "qwen2", head_dim=16, settings=ExportSettings(base_only=True, context_length=64))
    names = {value["name"] for value in (*exported.manifest["graph"]["inputs"], *exported.manifest["graph"]["outputs"])}
    assert exported.manifest["streams"] == ["base"]
    assert exported.manifest["gate"] is None
    assert exported.manifest["model"]["context_length"] == 64
    assert not any("adapter" in name or "query" in name or "gate" in name for name in names - {"query_seqlens"})
    assert exported.manifest["shared_layers"] == 0
    assert [layer["groups"] for layer in exported.manifest["cache"]] == [["base"]] * 2
    check_memories_apart(exported)


def test_every_phase_says_how_long_it_took(tiny: Exported, tmp_path: Path) -> None:
    lines: list[str] = []
    export_checkpoint(tiny.checkpoint, tmp_path / "artifact", report=lines.append)
    taken = [match[1] for line in lines if (match := re.fullmatch(r"(\w+) +done in \d+\.\d s", line))]
    assert taken == ["load", "prepare", "trace", "verify"]
