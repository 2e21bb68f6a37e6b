"""The graph run without the runtime: caches in bfloat16, and the execution provider that was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

import cli
from export.errors import ExportError, VerificationError
from export.pipeline import export_checkpoint
from export.providers import OPTIONS, check_provider, open_graph
from export.settings import ExportSettings
from export.verification.against_checkpoint import verify_against_checkpoint
from export.verification.plain_run import CachedGraph
from tests.exported import Exported

CUDA = "CUDAExecutionProvider"
PAST, PRESENT = "past_key_values.base.0.key", "present.base.0.key"


def remembering(path: Path, cache: int) -> Path:
    """A graph whose cache collects the tokens, and whose logits are the sum of all of them."""
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["new"], to=cache),
        helper.make_node("Concat", [PAST, "new"], [PRESENT], axis=1),
        helper.make_node("Cast", [PRESENT], ["all"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["all"], ["logits"], keepdims=1),
    ]
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
        helper.make_tensor_value_info(PAST, cache, ["batch", "past"]),
    ]
    outputs = [
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 1]),
        helper.make_tensor_value_info(PRESENT, cache, ["batch", "total"]),
    ]
    graph = helper.make_graph(nodes, "remembering", inputs, outputs)
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]), str(path))
    return path


@pytest.mark.parametrize("cache", [TensorProto.BFLOAT16, TensorProto.FLOAT16, TensorProto.FLOAT])
def test_caches_of_every_type_go_from_run_to_run(tmp_path: Path, cache: int) -> None:
    graph = CachedGraph(remembering(tmp_path / "g.onnx", cache), {})
    assert graph.prefill([[3, 4]])["logits"] == 7
    assert graph.decode([5])["logits"] == 12
    assert graph.decode([6])["logits"] == 18
    assert graph.chunks([[1], [2, 3]])["logits"] == 6
    assert isinstance(graph.state[PAST], onnxruntime.OrtValue) is (cache == TensorProto.BFLOAT16)


def test_a_provider_that_this_onnxruntime_has_not_is_refused_before_the_trace(tiny: Exported, tmp_path: Path) -> None:
    lines: list[str] = []
    with pytest.raises(ExportError, match=r"has no execution provider 'quantum' to verify with; it has .*cpu"):
        export_checkpoint(
            tiny.checkpoint, tmp_path / "a", ExportSettings(precision="bf16", verify_on="quantum"), report=lines.append
        )
    assert not any(line.startswith("trace") for line in lines)
    with pytest.raises(ExportError, match="has no execution provider 'quantum'"):
        verify_against_checkpoint(tiny.artifact, tiny.checkpoint, provider="quantum")


class FakeSession:
    """Stands in for onnxruntime's; `started` are the providers that it says it uses."""

    started: Sequence[str] = ()
    asked: Sequence[Any] = ()

    def __init__(self, source: Any, options: Any, providers: Sequence[Any]) -> None:
        type(self).asked = providers

    def get_providers(self) -> list[str]:
        return list(self.started)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> type[FakeSession]:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, "CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", FakeSession)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    return FakeSession


def test_a_provider_that_does_not_start_is_an_error(cuda: type[FakeSession], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "started", ["CPUExecutionProvider"])
    with pytest.raises(ExportError, match="execution provider 'cuda' did not start here"):
        check_provider("cuda")


def test_a_provider_that_starts_gets_its_options(cuda: type[FakeSession], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "started", [CUDA, "CPUExecutionProvider"])
    check_provider("cuda")
    assert list(cuda.asked) == [(CUDA, OPTIONS[CUDA]), ("CPUExecutionProvider", {})]


def test_a_graph_that_is_none_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "g.onnx").write_bytes(b"no graph")
    with pytest.raises(VerificationError, match="onnxruntime cannot load the graph on cpu"):
        open_graph(tmp_path / "g.onnx")


def test_bf16_is_verified_where_a_provider_is_named() -> None:
    assert not ExportSettings(precision="bf16").verifiable
    on_cuda = ExportSettings(precision="bf16", verify_on="cuda", eval_data=Path("texts.jsonl"))
    assert on_cuda.verifiable
    assert on_cuda.tolerance == 0.25
    assert ExportSettings(precision="int4", activations="fp16").tolerance == 0.05


def test_the_asked_provider_verifies_and_measures(
    tiny: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA's part is played by the CPU provider: what is asked for, and what the manifest says."""
    asked: list[str] = []

    def play(path: Path, provider: str = "cpu") -> onnxruntime.InferenceSession:
        asked.append(provider)
        return open_graph(path)

    monkeypatch.setattr("export.prepare.check_provider", lambda provider: asked.append(f"check {provider}"))
    monkeypatch.setattr("export.verification.plain_run.open_graph", play)
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "once upon a time"}\n')
    settings = ExportSettings(precision="fp16", verify_on="cuda", eval_data=texts)
    manifest = export_checkpoint(tiny.checkpoint, tmp_path / "a", settings, report=lambda line: None)
    assert asked == ["check cuda", "cuda", "cuda"]
    assert manifest["parity"]["provider"] == "cuda"
    assert tiny.manifest["parity"]["provider"] == "cpu"


def test_verify_takes_a_provider(tiny: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["verify", str(tiny.artifact), "--checkpoint", str(tiny.checkpoint)]
    assert cli.main([*words, "--provider", "cpu"]) == 0
    assert " on cpu" in capsys.readouterr().out
    assert cli.main([*words, "--provider", "quantum"]) == 2
    assert "unknown execution provider 'quantum'" in capsys.readouterr().err
    assert cli.main(["verify", str(tiny.artifact), "--provider", "coreml"]) == 2
    assert "execution provider 'coreml' is not in use" in capsys.readouterr().err
    assert np.isfinite(verify_against_checkpoint(tiny.artifact, tiny.checkpoint).tolerance)
