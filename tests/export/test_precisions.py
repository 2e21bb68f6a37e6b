"""fp16, bf16 and int8 caches from export to runtime, the quality report, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from export.pipeline import for_quantized_backbone
from export.settings import ExportSettings
from imsm_core.checkpoint import CheckpointInfo
from imsm_core.errors import SettingsError
from imsm_core.reference import reference_generate
from runtime import Session
from tests.builders import write_jsonl
from tests.exported import PROMPT, Exported, export_tiny
from tests.measured import check_memories_apart

STEPS = 8


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows: list[dict[str, object]] = [{"text": f"once upon a time number {number} came"} for number in range(6)]
    return write_jsonl(tmp_path_factory.mktemp("texts") / "texts.jsonl", rows)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory, held_out: Path) -> Exported:
    settings = ExportSettings(precision="fp16", eval_data=held_out)
    return export_tiny(tmp_path_factory.mktemp("half"), head_dim=16, settings=settings)


@pytest.fixture(scope="module")
def int8_caches(tmp_path_factory: pytest.TempPathFactory, held_out: Path) -> Exported:
    settings = ExportSettings(kv_cache="int8", calibrate=held_out, eval_data=held_out)
    return export_tiny(tmp_path_factory.mktemp("int8"), head_dim=16, settings=settings)


def differences(exported: Exported) -> list[float]:
    """The runtime's largest difference of logits from the uncached oracle, by step."""
    expected = reference_generate(exported.model, PROMPT, STEPS)
    session = Session(exported.artifact)
    state = session.new_state(1)
    output, found = session.prefill(state, [PROMPT]), []
    for step in expected:
        found.append(float(np.abs(output.logits[0] - step.logits.numpy()).max()))
        output = session.decode_step(state, [step.token])
    return found


def test_fp16_decodes_like_float32_up_to_its_own_rounding(half: Exported) -> None:
    found = differences(half)
    assert 1e-5 < max(found) < 0.1


def test_fp16_has_half_precision_caches_in_the_portable_form(half: Exported) -> None:
    session = Session(half.artifact)
    state = session.new_state(1)
    session.prefill(state, [PROMPT])
    assert {cache.dtype for cache in state.caches.values()} == {"float16"}
    assert set(state.caches) == {"base", "adapter"}
    assert half.manifest["activations"] == "float16"


def test_the_manifest_of_half_precision_says_which_nodes_have_no_cuda_kernel(half: Exported, tiny: Exported) -> None:
    nodes = len(onnx.load(str(half.artifact / "model.onnx"), load_external_data=False).graph.node)
    found = half.manifest["cuda_kernels"]
    assert found == {"onnxruntime": found["onnxruntime"], "nodes": nodes, "shape_nodes": 1, "missing": {}}
    assert tiny.manifest["cuda_kernels"] is None


def test_the_quality_report_is_in_the_manifest(half: Exported) -> None:
    quality = half.manifest["quality"]
    assert quality["texts"] == 6
    assert quality["tokens"] > 50
    assert quality["file"] == "texts.jsonl"
    for name in ("blend", "base", "adapter"):
        assert quality[name]["argmax_agreement"] > 0.9
        assert 0 < quality[name]["mean_kl"] < 1e-2
    check_memories_apart(half)


def test_int8_caches_take_a_quarter_and_stay_close(int8_caches: Exported, tiny: Exported) -> None:
    sizes = {}
    for name, artifact in (("int8", int8_caches.artifact), ("float", tiny.artifact)):
        session = Session(artifact)
        state = session.new_state(1)
        session.prefill(state, [PROMPT])
        sizes[name] = state.cache_bytes / session.manifest.layers[0].head_size
    assert sizes["int8"] * 4 == sizes["float"]
    found = differences(int8_caches)
    assert 1e-4 < max(found) < 2.0  # logits reach 10; another cache's content would be off by as much
    assert int8_caches.manifest["quality"]["blend"]["argmax_agreement"] > 0.7


def test_bf16_is_written_and_reported_as_unverified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exported = export_tiny(tmp_path, head_dim=16, settings=ExportSettings(precision="bf16"))
    assert exported.manifest["parity"]["max_abs_difference"] == {}
    inputs = {value["name"]: value["dtype"] for value in exported.manifest["graph"]["inputs"]}
    assert inputs["past_key_values.base.0.key"] == "bfloat16"
    assert exported.manifest["cuda_kernels"]["missing"] == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "int3"}, "precision is int3; choose one of fp32, "),
        ({"activations": "fp16"}, "activations is fp16; it needs int8 or int4 weights, and precision is fp32"),
        ({"precision": "int4", "activations": "fp8"}, "activations is fp8; choose one of"),
        ({"precision": "int4", "block_size": 24}, "block_size is 24; it must be a power of two"),
        ({"calibrate": Path("x")}, "calibrate is x; calibration needs"),
        ({"kv_cache": "int2"}, "kv_cache is int2; choose one of float, int8"),
        ({"precision": "bf16", "eval_data": Path("x")}, "eval_data is x; the quality of bf16 cannot be measured"),
        ({"eval_texts": 0}, "eval_texts is 0; it must be at least 1"),
        ({"max_delta_mb": -1.0}, "max_delta_mb is -1.0; it must be a number, at least 0"),
        ({"max_delta_mb": float("nan")}, "max_delta_mb is nan; it must be a number, at least 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        ExportSettings(**settings)  # type: ignore[arg-type]


def test_an_adapter_of_a_rounded_backbone_needs_the_same_one() -> None:
    trained = {"precision": "int4", "block_size": 32}
    info = CheckpointInfo("m", None, "f", "query_aware", 8, "LORA", quantized_backbone=trained)
    lines: list[str] = []
    for_quantized_backbone(info, ExportSettings(precision="int4"), lines.append)
    assert lines == []
    for_quantized_backbone(info, ExportSettings(precision="int4", block_size=64), lines.append)
    assert "trained against a backbone of int4 in blocks of 32" in lines[0]
    for_quantized_backbone(info, ExportSettings(precision="int4", rounding="nearest", mean_bits=4.5), lines.append)
    assert len(lines) == 2
    with pytest.raises(SettingsError, match=r"calibrate is x; .* leave it out"):
        for_quantized_backbone(info, ExportSettings(precision="int4", calibrate=Path("x")), lines.append)
