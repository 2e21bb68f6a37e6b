"""The bytes that a step reads, by hand-made graphs and against onnx's own reading of an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.step_reads import step_reads
from runtime.manifest import read_manifest
from tests.exported import Exported, copied


def reads(path: Path, nodes: list[onnx.NodeProto], weights: list[TensorProto]) -> dict[str, Any]:
    path.write_bytes(helper.make_model(helper.make_graph(nodes, "g", [], [], weights)).SerializeToString())
    return step_reads(ir.load(path))


def test_every_weight_of_an_artifact_is_counted(tiny: Exported, tmp_path: Path) -> None:
    artifact = copied(tiny.artifact, tmp_path / "artifact")  # onnx reads no file that has links, as other tests make
    graph = onnx.load(str(artifact / "model.onnx")).graph
    total = sum(numpy_helper.to_array(tensor).nbytes for tensor in graph.initializer)
    manifest = read_manifest(tiny.artifact)
    assert manifest.reads.bytes_per_step(10**6) == total
    read = manifest.reads.bytes_per_step(3)
    table = 259 * 32 * 4  # of the untied embedding three rows are read
    assert read <= total - table + 3 * 32 * 4
    assert read >= total - table - 2 * 640 * 4 * 4  # and rows of the rotary tables, if there are any


def test_a_table_costs_its_rows_unless_it_is_multiplied_too(tmp_path: Path) -> None:
    table = numpy_helper.from_array(np.zeros((100, 8), np.float32), "table")
    gather = helper.make_node("Gather", ["table", "ids"], ["rows"])
    matmul = helper.make_node("MatMul", ["x", "table"], ["logits"])
    alone = reads(tmp_path / "alone.onnx", [gather], [table])
    assert alone == {"bytes": 0, "rows": [{"bytes": 32, "rows": 100}], "experts": []}
    tied = reads(tmp_path / "tied.onnx", [gather, matmul], [table])
    assert tied == {"bytes": 3200, "rows": [], "experts": []}


@pytest.mark.parametrize(
    ("operator", "domain", "place"),
    [
        ("GatherBlockQuantized", "com.microsoft", 3),
        ("QuantizedGather", "imsm", 4),
        ("RotaryEmbedding", "com.microsoft", 3),
        ("RotaryEmbedding", "", 2),
        ("GroupQueryAttention", "com.microsoft", 8),
        ("GroupQueryAttention", "imsm", 7),
    ],
)
def test_tables_are_known_by_the_operator_and_the_place(operator: str, domain: str, place: int, tmp_path: Path) -> None:
    table = numpy_helper.from_array(np.zeros((100, 8), np.float32), "table")
    for at, expected in ((place, 0), (0 if operator != "GatherBlockQuantized" else 1, 3200)):
        inputs = [f"x{index}" for index in range(9)]
        inputs[at] = "table"
        node = helper.make_node(operator, inputs, ["y"], domain=domain)
        assert reads(tmp_path / "table.onnx", [node], [table])["bytes"] == expected


def test_what_a_subgraph_or_nothing_uses_counts_as_read(tmp_path: Path) -> None:
    table = numpy_helper.from_array(np.zeros((100, 8), np.float32), "table")
    output = helper.make_tensor_value_info("rows", TensorProto.FLOAT, None)
    branch = helper.make_graph([helper.make_node("Gather", ["table", "ids"], ["rows"])], "branch", [], [output])
    node = helper.make_node("If", ["condition"], ["y"], then_branch=branch, else_branch=branch)
    assert reads(tmp_path / "if.onnx", [node], [table])["bytes"] == 3200
    assert reads(tmp_path / "unused.onnx", [helper.make_node("Relu", ["x"], ["y"])], [table])["bytes"] == 3200


@pytest.mark.parametrize(("operator", "place"), [("MoE", 4), ("QMoE", 5)])
def test_experts_cost_those_that_a_token_may_be_routed_to(operator: str, place: int, tmp_path: Path) -> None:
    nodes, weights = [], []
    for layer in range(3):
        weights.append(numpy_helper.from_array(np.zeros((10, 4, 5), np.float32), f"experts{layer}"))
        inputs = ["x", "router", "up", "", "", "", ""]
        inputs[place] = f"experts{layer}"
        attributes: dict[str, Any] = {"k": 2, "activation_type": "swiglu"}
        nodes.append(helper.make_node(operator, inputs, [f"y{layer}"], domain="com.microsoft", **attributes))
    found = reads(tmp_path / "experts.onnx", nodes, weights)
    assert found == {"bytes": 0, "rows": [], "experts": [{"bytes": 3 * 80, "experts": 10, "top_k": 2}]}


def test_two_names_of_the_same_bytes_count_once(tmp_path: Path) -> None:
    tensors = []
    for name, dims in (("rows", (10, 16)), ("blocks", (10, 2, 8))):
        tensor = TensorProto(name=name, dims=dims, data_type=TensorProto.UINT8, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", "data"), ("offset", "64"), ("length", "160")):
            tensor.external_data.add(key=key, value=value)
        tensors.append(tensor)
    nodes = [
        helper.make_node("GatherBlockQuantized", ["rows", "ids", "scales"], ["y"], domain="com.microsoft"),
        helper.make_node("MatMulNBits", ["x", "blocks", "scales"], ["z"], domain="com.microsoft"),
    ]
    assert reads(tmp_path / "shared.onnx", nodes, tensors)["bytes"] == 160
    alone = reads(tmp_path / "table.onnx", nodes[:1], tensors[:1])
    assert alone == {"bytes": 0, "rows": [{"bytes": 16, "rows": 10}], "experts": []}


@pytest.mark.parametrize(
    ("kind", "size"), [(TensorProto.FLOAT16, 12), (TensorProto.INT4, 3), (TensorProto.INT64, 48), (TensorProto.BOOL, 6)]
)
def test_values_that_are_not_raw_have_the_size_of_their_type(tmp_path: Path, kind: int, size: int) -> None:
    tensor = helper.make_tensor("w", kind, (2, 3), [1, 0, 1, 0, 1, 0])
    assert reads(tmp_path / "w.onnx", [helper.make_node("Relu", ["w"], ["y"])], [tensor])["bytes"] == size
