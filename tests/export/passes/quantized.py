"""Products with int4 weights and the constants that they read, for the tests of the project's own operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from tests.graphs import graph, with_weights

WIDTH, RANK = 64, 4
RANDOM = np.random.default_rng(0)
CONSTANTS: dict[str, Any] = {
    "w": RANDOM.integers(0, 256, (WIDTH, 2, 16), np.uint8),
    "s": RANDOM.uniform(0.01, 0.02, (WIDTH, 2)).astype(np.float32),
    "w16": RANDOM.integers(0, 256, (WIDTH, 4, 8), np.uint8),
    "s16": RANDOM.uniform(0.01, 0.02, (WIDTH, 4)).astype(np.float32),
    "w64": RANDOM.integers(0, 256, (WIDTH, 1, 32), np.uint8),
    "s64": RANDOM.uniform(0.01, 0.02, (WIDTH, 1)).astype(np.float32),
    "half": RANDOM.uniform(0.01, 0.02, (WIDTH, 2)).astype(np.float16),
    "points": RANDOM.uniform(7, 9, (WIDTH, 2)).astype(np.float32),
    "order": np.zeros(WIDTH, np.int32),
    "ranks": np.array([RANK, RANK]),
    "shape": np.array([-1, 3, WIDTH]),
    "w2": RANDOM.integers(0, 256, (WIDTH, 2, 16), np.uint8),
    "l.adapter_a": RANDOM.standard_normal((WIDTH, RANK)).astype(np.float32),
    "l.adapter_b": RANDOM.standard_normal((RANK, WIDTH)).astype(np.float32),
    "l.adapter_two": RANDOM.standard_normal((WIDTH, 2 * RANK)).astype(np.float32),
    "l.adapter_scale": RANDOM.standard_normal(RANK).astype(np.float32),
}
DECLARED = {
    "w": f"uint8[{WIDTH},2,16] w",
    "s": f"float[{WIDTH},2] s",
    "w16": f"uint8[{WIDTH},4,8] w16",
    "s16": f"float[{WIDTH},4] s16",
    "w64": f"uint8[{WIDTH},1,32] w64",
    "s64": f"float[{WIDTH},1] s64",
    "half": f"float16[{WIDTH},2] half",
    "points": f"float[{WIDTH},2] points",
    "order": f"int32[{WIDTH}] order",
    "ranks": "int64[2] ranks",
    "shape": "int64[3] shape",
    "w2": f"uint8[{WIDTH},2,16] w2",
    "l.adapter_a": f'float[{WIDTH},{RANK}] "l.adapter_a"',
    "l.adapter_b": f'float[{RANK},{WIDTH}] "l.adapter_b"',
    "l.adapter_two": f'float[{WIDTH},{2 * RANK}] "l.adapter_two"',
    "l.adapter_scale": f'float[{RANK}] "l.adapter_scale"',
}
X = np.random.default_rng(1).standard_normal((2, 3, WIDTH)).astype(np.float32)
ROWS = np.array([0, 1], np.float32).reshape(2, 1, 1) * np.ones((1, 3, 1), np.float32)


def product(operands: str = "x, w, s", **changes: int) -> str:
    attributes = {"K": WIDTH, "N": WIDTH, "bits": 4, "block_size": 32, "accuracy_level": 4} | changes
    return (
        f"com.microsoft.MatMulNBits<{', '.join(f'{name}={value}' for name, value in attributes.items())}>({operands})"
    )


def model_of(lines: str, outputs: tuple[str, ...] = ("y",)) -> ir.Model:
    used = [
        text for name, text in DECLARED.items() if f'"{name}"' in lines or f" {name}," in lines or f" {name})" in lines
    ]
    shape = f"float[b,t,{WIDTH}]"
    results = ", ".join(f"{shape} {name}" for name in outputs)
    head = f"g ({shape} x, float[b,t,1] rows, {', '.join(used)}) => ({results})"
    return with_weights(graph(f"{head} {{ {lines} }}"), CONSTANTS)


def feed(model: ir.Model) -> dict[str, np.ndarray]:
    return {str(value.name): {"x": X, "rows": ROWS}[str(value.name)] for value in model.graph.inputs}
