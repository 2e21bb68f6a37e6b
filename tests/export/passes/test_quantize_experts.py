"""Experts in int4 and int8: whole exports of two mixtures, what their nodes compute, and which experts stay."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from transformers import AutoConfig

from export.passes.quantization import Quantization
from export.passes.quantize import PORTABLE_EXPERTS, Quantizer
from export.passes.quantize_experts import CHANGED, COMPUTED, HALF, INT8_COMPUTE
from export.passes.rewrite import Declined, Outcome
from export.quantization.weight_format import dequantize, round_to_nearest
from export.settings import ExportSettings
from runtime import Session
from tests.adapters import make_siamese_with
from tests.builders import make_siamese, save_tiny_checkpoint, write_base_folder
from tests.exported import Exported, export_existing
from tests.graphs import graph, kinds, with_weights
from tests.zoo import COMMON, LOCAL_EXPERTS

WIDTH = COMMON["hidden_size"]

INNER = 48  # whole blocks of 16
EXPERTS = LOCAL_EXPERTS["num_local_experts"]
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {},  # gate and up one after the other
    "gpt_oss": {"head_dim": 8},  # interleaved, stored as (in, out), with biases
}


def export_mixture(
    folder: Path, kind: str, settings: ExportSettings, all_linear: bool = False, inner: int = INNER
) -> Exported:
    config = AutoConfig.for_model(kind, **(COMMON | LOCAL_EXPERTS | KINDS[kind] | {"intermediate_size": inner}))
    base = write_base_folder(folder / "base", config)
    model = make_siamese_with(base, "lora") if all_linear else make_siamese(base, target_modules=["q_proj", "v_proj"])
    info = save_tiny_checkpoint(model, base, folder / "checkpoint")
    return export_existing(folder, base, model, info, settings)


@pytest.fixture(
    scope="module",
    params=[
        ("mixtral", "int4", True),
        ("mixtral", "int8", False),
        ("gpt_oss", "int4", False),
        ("gpt_oss", "int8", True),
    ],
    ids=lambda param: f"{param[0]}-{param[1]}",
)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    kind, precision, symmetric = request.param
    settings = ExportSettings(precision=precision, block_size=16, symmetric=symmetric, rounding="nearest")
    return export_mixture(tmp_path_factory.mktemp(kind), kind, settings)


def graph_of(exported: Exported, data: bool = False) -> onnx.GraphProto:
    return onnx.load(str(exported.artifact / "model.onnx"), load_external_data=data).graph


def expert_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    return [node for node in graph.node if node.op_type in ("MoE", "QMoE")]


def declined(exported: Exported) -> dict[str, int]:
    """Why the quantizer left candidates as they are."""
    reasons: dict[str, int] = exported.manifest["passes"]["quantize"]["declined"]
    return reasons


def test_every_layers_experts_are_quantized_and_compute_in_int8(exported: Exported) -> None:
    graph = graph_of(exported)
    nodes = expert_nodes(graph)
    assert [node.op_type for node in nodes] == ["QMoE"] * COMMON["num_hidden_layers"]
    for node in nodes:
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        assert attributes["accuracy_level"] == INT8_COMPUTE
        assert attributes["block_size"] == 16
        assert attributes["expert_weight_bits"] == exported.manifest["quantization"]["bits"]
    assert exported.manifest["quantization"]["experts"] == len(nodes)
    assert exported.manifest["quantization"]["kept_bytes"] == 0
    floats = [tensor.name for tensor in graph.initializer if "proj" in tensor.name and len(tensor.dims) == 3]
    assert all(name.endswith(("int4", "int8", "scales", "zero_points")) for name in floats)


def test_the_file_was_pytorchs_with_rounded_experts_before_it_computed_in_int8(exported: Exported) -> None:
    parity = exported.manifest["parity"]
    assert parity["tolerance"] == 1e-4
    assert parity["pytorch_rounding"] is None
    for way in ("prefill", "decode", "chunked prefill"):
        assert max(parity["max_abs_difference"][way].values()) < 1e-3


def test_the_experts_have_the_models_own_values_rounded(exported: Exported) -> None:
    settings = exported.manifest["quantization"]
    graph = graph_of(exported, data=True)
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    down = exported.model.causal_lm.get_parameter("model.layers.1.mlp.experts.down_proj").detach()
    transposed = exported.model.causal_lm.config.model_type == "gpt_oss"
    rows = (down.transpose(1, 2) if transposed else down).reshape(EXPERTS * WIDTH, INNER).numpy()
    wanted = round_to_nearest(rows, settings["bits"], 16, settings["symmetric"])
    node = expert_nodes(graph)[1]
    np.testing.assert_array_equal(tensors[node.input[5]].reshape(wanted.packed.shape), wanted.packed)
    np.testing.assert_array_equal(tensors[node.input[6]].reshape(wanted.scales.shape), wanted.scales)
    if wanted.zero_points is not None:
        np.testing.assert_array_equal(tensors[node.input[12]].reshape(wanted.zero_points.shape), wanted.zero_points)
    assert not np.array_equal(dequantize(wanted, INNER), rows)  # there was something to round


def test_it_decodes_as_it_prefills(exported: Exported) -> None:
    session = Session(exported.artifact)
    text = [0, 80, 104, 77, 35, 102, 114]
    state = session.new_state(1)
    session.prefill(state, [text[:3]])
    for token in text[3:]:
        stepped = session.decode_step(state, [token]).logits
    whole, another = (session.prefill(session.new_state(1), [part]).logits for part in (text, text[:-1]))
    # Activations are rounded to int8, and the steps' sums are in another order.
    assert np.sqrt(((stepped - whole) ** 2).mean()) < 0.3 * np.sqrt(((stepped - another) ** 2).mean())


def test_experts_of_broken_blocks_stay(tmp_path: Path) -> None:
    exported = export_mixture(
        tmp_path, "mixtral", ExportSettings(precision="int4", block_size=16, rounding="nearest"), inner=40
    )
    assert [node.op_type for node in expert_nodes(graph_of(exported))] == ["MoE"] * COMMON["num_hidden_layers"]
    sizes = exported.manifest["quantization"]
    assert (sizes["experts"], sizes["kept_bytes"]) == (0, 4 * 2 * EXPERTS * 3 * 40 * WIDTH)
    assert declined(exported)["the experts' inputs are not whole blocks of 16"] == COMMON["num_hidden_layers"]


def test_the_portable_form_keeps_experts_that_older_kernels_know(tmp_path: Path) -> None:
    settings = ExportSettings(precision="int4", block_size=16, portable=True, rounding="nearest")
    exported = export_mixture(tmp_path, "mixtral", settings)
    assert [node.op_type for node in expert_nodes(graph_of(exported))] == ["MoE"] * COMMON["num_hidden_layers"]
    assert declined(exported)[PORTABLE_EXPERTS.reason] == COMMON["num_hidden_layers"]


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # PEFT's own, of its "all-linear"
def test_experts_that_the_adapter_changes_stay(tmp_path: Path) -> None:
    exported = export_mixture(
        tmp_path, "mixtral", ExportSettings(precision="int4", block_size=16, rounding="nearest"), all_linear=True
    )
    assert {node.op_type for node in expert_nodes(graph_of(exported))} <= {"MoE"}
    assert exported.manifest["quantization"]["experts"] == 0
    assert declined(exported)


def mixture_graph(up: str = "up", more: str = "", dtype: str = "float") -> ir.Model:
    """One node of two experts, whose weights are (2, 32, 32) each way; not to be run."""
    text = f"""g ({dtype}[3, 32] x, {dtype}[3, 2] router, {dtype}[2, 32, 32] up, {dtype}[2, 32, 32] "up.adapter_a",
        {dtype}[2, 32, 32] down) => ({dtype}[3, 32] y, {dtype}[2, 32, 32] z)
        {{ z = Abs(up) {more} y = com.microsoft.MoE<k = 1>(x, router, {up}, "", down) }}"""
    values = np.ones((2, 32, 32), np.float32 if dtype == "float" else np.float16)
    model = with_weights(graph(text), {name: values for name in ("up", "up.adapter_a", "down")})
    if up != "up" or more:
        return model
    model.graph.outputs.pop()
    model.graph.remove(next(iter(model.graph)), safe=True)
    return model


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, None),
        ({"more": "w = Abs(up)"}, CHANGED),
        ({"up": '"up.adapter_a"'}, CHANGED),
        ({"up": "w", "more": "w = Neg(up)"}, COMPUTED),
        ({"dtype": "float16"}, HALF),
    ],
    ids=["the backbone's", "read twice", "the adapter's", "computed", "half precision"],
)
def test_experts_say_why_they_stay(arguments: dict[str, str], reason: Declined | None) -> None:
    model = mixture_graph(**arguments)
    quantizer = Quantizer(Quantization(4))
    expected = Outcome(1) if reason is None else Outcome(0, Counter({reason.reason: 1}))
    assert quantizer(model) == expected
    assert kinds(model)[-1] == ("QMoE" if reason is None else "MoE")
    assert quantizer.done.experts == (reason is None)
