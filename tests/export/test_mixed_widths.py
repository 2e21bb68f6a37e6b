"""A whole export whose weights have 4, 5, 6 and 8 bits, the tied embedding among those of 6, some with zero points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest

import export.pipeline
from export.passes.quantization import Quantization
from export.prepare import Prepared, prepare
from export.quantization.layers import backbone_layers
from export.quantization.weight_format import QuantizedWeight, round_to_nearest
from export.settings import ExportSettings
from runtime import Session
from tests.builders import VOCABULARY
from tests.exported import Exported, export_tiny

WIDTHS = {
    "self_attn.q_proj": 6,  # packed with two that differ
    "self_attn.k_proj": 5,
    "self_attn.v_proj": 4,
    "self_attn.o_proj": 5,
    "mlp.gate_proj": 6,
    "mlp.up_proj": 6,
    "mlp.down_proj": 8,
}
EMBEDDINGS = ("model.embed_tokens", "lm_head")


def calibrated(prepared: Prepared) -> Mapping[str, QuantizedWeight]:
    """Every layer in its width, those of the second one with zero points; gate and up differ there."""
    found = {}
    layers: dict[str, Any] = dict(backbone_layers(prepared.model))
    for name, layer in layers.items():
        bits = next(bits for suffix, bits in WIDTHS.items() if name.endswith(suffix))
        if name == "model.layers.1.mlp.up_proj":
            bits = 5
        found[name] = round_to_nearest(layer.weight.detach().numpy(), bits, 32, "layers.0" in name)
    embeddings: Any = prepared.model.causal_lm.get_input_embeddings()
    table = embeddings.weight.detach().numpy()
    return found | dict.fromkeys(EMBEDDINGS, round_to_nearest(table, 6, 32, True))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """With a random LoRA, which is not zero."""

    def with_widths(*args: Any) -> Prepared:
        prepared = prepare(*args)
        return replace(prepared, quantization=Quantization(4, 32, True, calibrated(prepared), half_scales=True))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export.pipeline, "prepare", with_widths)
        folder = tmp_path_factory.mktemp("mixed")
        return export_tiny(folder, head_dim=16, tied=True, settings=ExportSettings(precision="int4"))


def bits_of(node: onnx.NodeProto) -> int:
    return next(int(attribute.i) for attribute in node.attribute if attribute.name == "bits")


def test_every_product_has_the_width_of_its_weights(exported: Exported) -> None:
    graph = onnx.load(str(exported.artifact / "model.onnx"), load_external_data=False).graph
    found = [(node.op_type, bits_of(node)) for node in graph.node if node.op_type.startswith("Quantized")]
    low_rank, swiglu = "QuantizedMatMulLowRank", "QuantizedSwiGLULowRank"
    first = [(low_rank, 6), (low_rank, 5), (swiglu, 6), (low_rank, 8)]
    second = [(low_rank, 6), (low_rank, 5), (low_rank, 6), (low_rank, 5), (low_rank, 8)]
    assert found == [("QuantizedGather", 6), *first, *second, ("QuantizedMatMul", 6)]
    names = {node.op_type for node in graph.node}
    assert not names & {"MatMulNBits", "GatherBlockQuantized"}


def test_the_graph_was_pytorchs_with_the_rounded_values(exported: Exported) -> None:
    parity = exported.manifest["parity"]
    for way in ("prefill", "decode", "chunked prefill"):
        assert max(parity["max_abs_difference"][way].values()) < 1e-3
    assert parity["greedy_tokens_equal"] == parity["decode_steps"]


def test_the_file_has_the_bits_and_no_bytes_for_them(exported: Exported) -> None:
    proto = onnx.load(str(exported.artifact / "model.onnx"), load_external_data=False)
    by_name = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    lookup = next(node for node in proto.graph.node if node.op_type == "QuantizedGather")
    head = [node for node in proto.graph.node if node.op_type == "QuantizedMatMul"][-1]
    assert [by_name[name] for name in lookup.input[1:3]] == [(VOCABULARY, 2, 16), (VOCABULARY, 1, 32)]
    assert (head.input[1], head.input[5], head.input[2]) == tuple(lookup.input[1:4])
    assert len([name for name in by_name if name.endswith(".int8")]) == 2  # down_proj
    rows = {entry["rows"] for entry in exported.manifest["reads"]["rows"]}
    assert VOCABULARY not in rows  # the head reads all of them


def test_functions_and_kernels_say_the_same(exported: Exported) -> None:
    prompt = np.random.default_rng(0).integers(3, VOCABULARY, 21).tolist()
    outputs = []
    for kernels in (True, False):
        session = Session(exported.artifact, threads=1, kernels=kernels)
        state = session.new_state()
        outputs.append([session.prefill(state, [prompt]).logits, session.decode_step(state, [prompt[0]]).logits])
    for mine, theirs in zip(*outputs, strict=True):
        assert np.median(np.abs(mine - theirs)) < 0.05 * np.abs(theirs).max()
