"""One node of every operator that has kernels, and a session of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from runtime.engine import own_kernels

if own_kernels.library() is None:
    pytest.skip(own_kernels.describe(), allow_module_level=True)

K, N, RANK, ROWS = 64, 33, 4, 6
HEADS, KV_HEADS, SIZE, TOKENS, POSITIONS, PAST = 4, 2, 16, 2, 16, 7
WIDTH = (HEADS + 2 * KV_HEADS) * SIZE
OUTPUTS = {"GroupQueryAttention": 3}
Inputs = dict[str, Any]  # arrays, or None for one that is left out


def run(operator: str, inputs: Inputs, attributes: dict[str, Any]) -> list[np.ndarray]:
    """Runs one node with the kernels; an input that is None is left out."""
    given = {name: values for name, values in inputs.items() if values is not None}
    operands = [name if name in given else "" for name in inputs]
    while operands[-1] == "":
        operands.pop()
    outputs = [f"y{index}" for index in range(OUTPUTS.get(operator, 1))]
    graph = helper.make_graph(
        [helper.make_node(operator, operands, outputs, domain="imsm", **attributes)],
        "g",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(values.dtype), values.shape)
            for name, values in given.items()
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("imsm", 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.register_custom_ops_library(str(own_kernels.library()))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(None, given)
    return found


def floats(*shape: int) -> np.ndarray:
    return np.full(shape, 0.5, np.float32)


def matrix(name: str = "") -> Inputs:
    return {
        f"{name}weights": np.zeros((N, K // 32, 16), np.uint8),
        f"{name}scales": floats(N, K // 32),
        f"{name}zeros": np.zeros((N, 1), np.uint8),
        f"{name}bias": floats(N),
    }


def factors(*names: str) -> Inputs:
    found: Inputs = {"rows": floats(ROWS)}
    for name in names:
        found |= {f"{name}a": floats(K, RANK), f"{name}b": floats(RANK, N)}
    return found


PRODUCT = {"K": K, "N": N, "bits": 4, "block_size": 32}
NODES: dict[str, tuple[Inputs, dict[str, Any]]] = {
    "QuantizedMatMul": ({"x": floats(ROWS, K)} | matrix(), PRODUCT),
    "QuantizedMatMulLowRank": ({"x": floats(ROWS, K)} | matrix() | factors(""), PRODUCT),
    "QuantizedSwiGLU": ({"x": floats(ROWS, K)} | matrix("gate_") | matrix("up_"), PRODUCT),
    "QuantizedSwiGLULowRank": (
        {"x": floats(ROWS, K)} | matrix("gate_") | matrix("up_") | factors("gate_", "up_"),
        PRODUCT,
    ),
    "QuantizedGather": (
        {
            "ids": np.array([[0, N - 1]]),
            "weights": np.zeros((N, K // 32, 16), np.uint8),
            "more": np.zeros((N, 1, 32), np.uint8),
            "scales": floats(N, K // 32),
            "zeros": np.zeros((N, K // 32), np.uint8),
        },
        {"bits": 6, "block_size": 32},
    ),
    "GroupQueryAttention": (
        {
            "query": floats(2, TOKENS, WIDTH),
            "key": None,
            "value": None,
            "past_key": floats(2, KV_HEADS, PAST, SIZE),
            "past_value": floats(2, KV_HEADS, PAST, SIZE),
            "seqlens_k": np.array([6, 5], np.int32),
            "total": np.array(PAST, np.int32),
            "cos": floats(POSITIONS, SIZE // 2),
            "sin": floats(POSITIONS, SIZE // 2),
            "query_seqlens": np.array([2, 2], np.int32),
        },
        {"num_heads": HEADS, "kv_num_heads": KV_HEADS, "scale": 0.3, "do_rotary": 1},
    ),
}
