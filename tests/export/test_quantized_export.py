"""Whole int4 exports: a tied Llama, and a GPT-2 with zero points and Conv1D layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from export.settings import ExportSettings
from runtime import Session
from tests.builders import VOCABULARY
from tests.exported import Exported, export_tiny
from tests.measured import check_memories_apart

FORCED = 1e4
# Every row's activations are rounded to int8 by themselves, so that steps and a prefill differ like sums in another
# order, unless an activation falls to the other side of a step. Measured on 300 texts with logits of up to 17: at most
# 1e-5 in 98 of 100, and 0.16 at most; with one token fewer, 3.3 at least.
MOSTLY, AT_MOST, ANOTHER_TEXT = 1e-3, 0.5, 1.0


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp(f"int4_{request.param}")
    if request.param == "llama":
        return export_tiny(
            folder, head_dim=16, tied=True, settings=ExportSettings(precision="int4", rounding="nearest")
        )
    return export_tiny(
        folder, "gpt2", head_dim=12, settings=ExportSettings(precision="int4", symmetric=False, rounding="nearest")
    )


@pytest.fixture(scope="module")
def proto(exported: Exported) -> onnx.GraphProto:
    return onnx.load(str(exported.artifact / "model.onnx"), load_external_data=False).graph


def nodes(proto: onnx.GraphProto, kind: str) -> list[onnx.NodeProto]:
    return [node for node in proto.node if node.op_type == kind]


OWN = ("QuantizedMatMul", "QuantizedMatMulLowRank", "QuantizedSwiGLU", "QuantizedSwiGLULowRank")


def quantized_weights(proto: onnx.GraphProto) -> list[str]:
    """The weights of all products, in the graph's order."""
    return [
        name
        for node in proto.node
        if node.op_type in ("MatMulNBits", *OWN)
        for name in node.input
        if name.endswith(".int4")
    ]


def places(proto: onnx.GraphProto) -> dict[str, tuple[int, int]]:
    """(offset, length) in the data file by name."""
    found = {}
    for tensor in proto.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries:
            found[tensor.name] = int(entries["offset"]), int(entries["length"])
    return found


def test_the_file_was_pytorchs_with_the_rounded_weights_before_it_computed_in_int8(exported: Exported) -> None:
    parity = exported.manifest["parity"]
    assert parity["tolerance"] == 1e-4
    assert parity["pytorch_rounding"] is None  # nothing was past the tolerance
    for way in ("prefill", "decode", "chunked prefill"):
        assert max(parity["max_abs_difference"][way].values()) < 1e-3
    assert parity["greedy_tokens_equal"] == parity["decode_steps"]


def test_every_product_with_a_quantized_weight_computes_in_int8(exported: Exported, proto: onnx.GraphProto) -> None:
    model = onnx.load(str(exported.artifact / "model.onnx"), load_external_data=False)
    assert len(quantized_weights(proto)) == exported.manifest["quantization"]["matrices"]
    functions = [node for function in model.functions for node in function.node]
    products = [node for node in [*proto.node, *functions] if node.op_type == "MatMulNBits"]
    levels = [attribute.i for node in products for attribute in node.attribute if attribute.name == "accuracy_level"]
    assert levels == [4] * len(products)
    assert levels


def test_the_backbones_matrices_are_all_quantized_and_have_their_names(
    exported: Exported, proto: onnx.GraphProto
) -> None:
    found = exported.manifest["quantization"]
    assert found["kept_bytes"] == 0
    assert (found["rounding"], found["mean_bits"]) == ("nearest", 4)
    sizes = 259 * 64 + 2 * (64 * 192 + 3 * 64 * 124), 259 * 48 + 2 * 12 * 48 * 48
    assert found["widths"] == {"4": sizes[exported.manifest["model"]["architecture"] == "gpt2"]}
    products = quantized_weights(proto)
    llama = "model.layers.0.self_attn.q_proj" in products[0]
    assert len(products) == (2 * 5 if llama else 2 * 4) + 1  # q, k and v in one; and the head
    layer, head = (
        ("model.model.layers.", "model.lm_head.weight") if llama else ("model.transformer.h.", "model.lm_head.")
    )
    assert all(name.startswith(layer) for name in products[:-1])
    assert products[-1].startswith(head)
    assert all(".weight" in name for name in products)


def test_an_export_consists_of_the_projects_own_operators(exported: Exported, proto: onnx.GraphProto) -> None:
    llama = exported.manifest["model"]["architecture"] == "llama"
    found = [node.op_type for node in proto.node if node.domain == "imsm"]
    a_layer = ["QuantizedMatMulLowRank", "GroupQueryAttention", "QuantizedMatMulLowRank", "QuantizedSwiGLULowRank"]
    if not llama:  # has no gate, and its Conv1D layers flatten what the adapter does not
        a_layer = ["QuantizedMatMul", "GroupQueryAttention", "QuantizedMatMul", "QuantizedMatMul"]
    assert found == [*a_layer, a_layer[0]] * 2 + ["QuantizedMatMul"]
    scales = [tensor for tensor in proto.initializer if ".scales" in tensor.name]
    assert {tensor.data_type for tensor in scales} == {onnx.TensorProto.FLOAT16}


def test_the_functions_compute_what_the_kernels_do(exported: Exported) -> None:
    prompt = next(texts())[0]
    sessions = [Session(exported.artifact, threads=1, kernels=kernels) for kernels in (True, False)]
    with_kernels, without = (session.prefill(session.new_state(), [prompt]).logits for session in sessions)
    assert np.median(np.abs(with_kernels - without)) < 0.05 * np.abs(without).max()


def test_a_conv1d_layers_bias_is_in_the_product(exported: Exported, proto: onnx.GraphProto) -> None:
    products = [node for kind in OWN[:2] for node in nodes(proto, kind)]
    biases = [node.input[4] for node in products if len(node.input) > 4 and node.input[4]]
    assert len(biases) == (8 if exported.manifest["model"]["architecture"] == "gpt2" else 0)
    assert all(name.endswith(".bias") for name in biases)


def test_tied_embeddings_and_head_are_the_same_bytes_and_nothing_is_stored_twice(
    exported: Exported, proto: onnx.GraphProto
) -> None:
    (lookup,) = nodes(proto, "GatherBlockQuantized")
    head = [node for node in proto.node if node.op_type in ("MatMulNBits", *OWN)][-1]
    found = places(proto)
    assert found[lookup.input[0]] == found[head.input[1]]
    widened = {node.output[0]: node.input[0] for node in nodes(proto, "Cast")}
    assert widened.get(lookup.input[2], lookup.input[2]) == head.input[2]
    assert list(lookup.input[3:]) == list(head.input[3:])
    parts = sorted(set(found.values()))
    assert [offset + length for offset, length in parts[:-1]] == [offset for offset, _ in parts[1:]]
    assert sum(length for _, length in parts) == exported.manifest["files"]["model.onnx.data"]["bytes"]


def test_the_bytes_in_the_manifest_are_those_of_the_file(exported: Exported, proto: onnx.GraphProto) -> None:
    found, read = places(proto), dict[str, int]()
    stored = {
        tensor.name: onnx.numpy_helper.to_array(tensor).nbytes
        for tensor in proto.initializer
        if tensor.name not in found
    }
    widened = {node.output[0]: node.input[0] for node in nodes(proto, "Cast")}
    weights = {"GatherBlockQuantized": (0, 2, 3), "QuantizedSwiGLULowRank": (1, 2, 3, 5, 6, 7)}
    for node in proto.node:
        wanted = weights.get(node.op_type, (1, 2, 3) if node.op_type in OWN else ())
        for name in [node.input[place] for place in wanted if place < len(node.input) and node.input[place]]:
            held = widened.get(name, name)
            offset, length = found.get(held, (held, stored.get(held, 0)))  # a view has its tensor's offset
            assert length
            read[str(offset)] = length
    assert sum(read.values()) == exported.manifest["quantization"]["bytes"]


def test_each_memory_is_measured_by_itself(exported: Exported) -> None:
    check_memories_apart(exported)


def texts() -> Iterator[tuple[list[int], list[int]]]:
    """Prompts and what follows them."""
    generator = np.random.default_rng(0)
    for _ in range(10):
        yield generator.integers(3, VOCABULARY, 11).tolist(), generator.integers(3, VOCABULARY, 6).tolist()


def last_logits(session: Session, prompt: Sequence[int], rest: Sequence[int], bias: float) -> NDArray[Any]:
    """After `rest` was fed token by token."""
    state = session.new_state(1, memory_bias=bias)
    output = session.prefill(state, [prompt])
    for token in rest:
        output = session.decode_step(state, [token])
    logits: NDArray[Any] = output.logits[0]
    return logits


@pytest.mark.parametrize("bias", [FORCED, -FORCED], ids=["base", "adapter"])
def test_cached_steps_equal_a_prefill_of_the_whole_text(exported: Exported, bias: float) -> None:
    session = Session(exported.artifact, threads=1)
    differences = []
    for prompt, rest in texts():
        whole = last_logits(session, [*prompt, *rest], [], bias)
        differences.append(np.abs(last_logits(session, prompt, rest, bias) - whole).max())
        assert np.abs(last_logits(session, prompt, rest[:-1], bias) - whole).max() > ANOTHER_TEXT
    assert np.median(differences) < MOSTLY
    assert max(differences) < AT_MOST


def test_the_blended_steps_are_the_scores_of_the_same_text(exported: Exported) -> None:
    session = Session(exported.artifact, threads=1)
    differences = []
    for prompt, rest in texts():
        steps = np.stack([last_logits(session, prompt, rest[:length], 0.0) for length in range(len(rest))])
        steps = steps.astype(np.float64) - np.log(np.exp(steps.astype(np.float64)).sum(-1, keepdims=True))
        found = steps[np.arange(len(rest)), rest]
        differences.append(np.abs(found - session.score(prompt, rest)).max())
    assert np.median(differences) < MOSTLY
    assert max(differences) < AT_MOST


def test_the_portable_form_has_none_of_the_projects_operators(tmp_path: Path) -> None:
    exported = export_tiny(
        tmp_path, head_dim=16, settings=ExportSettings(precision="int4", portable=True, rounding="nearest")
    )
    model = onnx.load(str(exported.artifact / "model.onnx"), load_external_data=False)
    assert not model.functions
    assert {node.domain for node in model.graph.node} <= {"", "com.microsoft"}
    assert not any(name.startswith("fuse_quantized") for name in exported.manifest["passes"])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("adapter", ["lora_tokens", "trainable_tokens", "lora_saved_embeddings"])
def test_trained_embeddings_keep_their_values_beside_a_rounded_table(tmp_path: Path, adapter: str, tied: bool) -> None:
    exported = export_tiny(tmp_path, tied=tied, adapter=adapter, settings=ExportSettings(precision="int8"))
    assert exported.manifest["parity"]["greedy_tokens_equal"] == exported.manifest["parity"]["decode_steps"]
    assert exported.manifest["quantization"]["embeddings"]
