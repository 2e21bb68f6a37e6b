"""The bytes that a step reads, against onnx's own reading of the same graphs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from runtime.errors import ArtifactError
from runtime.weights import read_weights
from tests.exported import Exported


def save(path: Path, nodes: list[onnx.NodeProto], weights: list[TensorProto]) -> Path:
    graph = helper.make_graph(nodes, "g", [], [], weights)
    path.write_bytes(helper.make_model(graph).SerializeToString())
    return path


def test_every_weight_of_an_artifact_is_counted(tiny: Exported) -> None:
    graph = onnx.load(str(tiny.artifact / "model.onnx")).graph
    sizes = {tensor.name: numpy_helper.to_array(tensor).nbytes for tensor in graph.initializer}
    weights = read_weights(tiny.artifact / "model.onnx")
    assert sum(weight.bytes for weight in weights) == sum(sizes.values())
    read = sum(weight.bytes_read(3) for weight in weights)
    table = 259 * 32 * 4  # of the untied embedding three rows are read
    assert read <= sum(sizes.values()) - table + 3 * 32 * 4
    assert read >= sum(sizes.values()) - table - 2 * 640 * 4 * 4  # and rows of the rotary tables, if there are some


def test_a_table_costs_its_rows_unless_it_is_multiplied_too(tmp_path: Path) -> None:
    table = numpy_helper.from_array(np.zeros((100, 8), np.float32), "table")
    gather = helper.make_node("Gather", ["table", "ids"], ["rows"])
    matmul = helper.make_node("MatMul", ["x", "table"], ["logits"])
    (alone,) = read_weights(save(tmp_path / "alone.onnx", [gather], [table]))
    assert (alone.bytes, alone.bytes_read(1), alone.bytes_read(5), alone.bytes_read(500)) == (3200, 32, 160, 3200)
    (tied,) = read_weights(save(tmp_path / "tied.onnx", [gather, matmul], [table]))
    assert tied.bytes_read(1) == 3200


@pytest.mark.parametrize(("operator", "place"), [("MoE", 4), ("QMoE", 5)])
def test_experts_cost_those_that_a_token_may_be_routed_to(operator: str, place: int, tmp_path: Path) -> None:
    experts = numpy_helper.from_array(np.zeros((10, 4, 5), np.float32), "experts")
    inputs = ["x", "router", "up", "", "", "", ""]
    inputs[place] = "experts"
    node = helper.make_node(operator, inputs, ["y"], domain="com.microsoft", k=2, activation_type="swiglu")
    (weight,) = read_weights(save(tmp_path / "experts.onnx", [node], [experts]))
    assert (weight.bytes, weight.bytes_read(1), weight.bytes_read(1, 2), weight.bytes_read(3, 2)) == (
        800,
        160,
        320,
        800,
    )


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
    (weight,) = read_weights(save(tmp_path / "shared.onnx", nodes, tensors))
    assert (weight.bytes, weight.bytes_read(1)) == (160, 160)
    (weight,) = read_weights(save(tmp_path / "table.onnx", nodes[:1], tensors[:1]))
    assert weight.bytes_read(1) == 16


@pytest.mark.parametrize(
    ("kind", "size"), [(TensorProto.FLOAT16, 12), (TensorProto.INT4, 3), (TensorProto.INT64, 48), (TensorProto.BOOL, 6)]
)
def test_values_that_are_not_raw_have_the_size_of_their_type(tmp_path: Path, kind: int, size: int) -> None:
    tensor = helper.make_tensor("w", kind, (2, 3), [1, 0, 1, 0, 1, 0])
    (weight,) = read_weights(save(tmp_path / "w.onnx", [helper.make_node("Relu", ["w"], ["y"])], [tensor]))
    assert (weight.dims, weight.bytes) == ((2, 3), size)


@pytest.mark.parametrize("content", [b"not a graph at all", b"\x3a\xff\x01"])
def test_a_damaged_graph_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "damaged.onnx"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_weights(path)
