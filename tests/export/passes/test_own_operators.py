"""When products, SwiGLU and attention become this project's own operators, and when not. What their kernels compute is
tested in tests/parity/test_kernels.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from export.passes.attention_operator import use_own_attention
from export.passes.quantized_matmul import fuse_quantized_matmul
from export.passes.quantized_swiglu import fuse_quantized_swiglu
from tests.graphs import graph, kinds, run, with_weights

WIDTH, RANK = 64, 4
RANDOM = np.random.default_rng(0)
CONSTANTS: dict[str, Any] = {
    "w": RANDOM.integers(0, 256, (WIDTH, 2, 16), np.uint8),
    "s": RANDOM.uniform(0.01, 0.02, (WIDTH, 2)).astype(np.float32),
    "w16": RANDOM.integers(0, 256, (WIDTH, 4, 8), np.uint8),
    "s16": RANDOM.uniform(0.01, 0.02, (WIDTH, 4)).astype(np.float32),
    "w2": RANDOM.integers(0, 256, (WIDTH, 2, 16), np.uint8),
    "l.adapter_a": RANDOM.standard_normal((WIDTH, RANK)).astype(np.float32),
    "l.adapter_b": RANDOM.standard_normal((RANK, WIDTH)).astype(np.float32),
    "l.adapter_scale": RANDOM.standard_normal(RANK).astype(np.float32),
}
DECLARED = {
    "w": f"uint8[{WIDTH},2,16] w",
    "s": f"float[{WIDTH},2] s",
    "w16": f"uint8[{WIDTH},4,8] w16",
    "s16": f"float[{WIDTH},4] s16",
    "w2": f"uint8[{WIDTH},2,16] w2",
    "l.adapter_a": f'float[{WIDTH},{RANK}] "l.adapter_a"',
    "l.adapter_b": f'float[{RANK},{WIDTH}] "l.adapter_b"',
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


CHANGED = f"""
    plain = {product()}
    low = MatMul(x, "l.adapter_a")
    kept = Mul(low, rows)
    change = MatMul(kept, "l.adapter_b")
    y = Add(plain, change)
"""


def test_a_product_and_its_change_become_one_node_that_any_onnxruntime_runs() -> None:
    model = model_of(CHANGED)
    before = run(model, **feed(model))
    assert fuse_quantized_matmul(model) == 1
    assert kinds(model) == ["QuantizedMatMulLowRank"]
    assert sorted(model.graph.initializers) == ["l.adapter_a", "l.adapter_b", "s", "w"]
    onnx.checker.check_model(ir.to_proto(model))
    np.testing.assert_allclose(run(model, **feed(model))[0], before[0], atol=1e-5)


@pytest.mark.parametrize(
    ("lines", "outputs", "expected"),
    [
        # the product is read by something else too
        (CHANGED + "z = Neg(plain)", ("y", "z"), ["MatMul", "Mul", "MatMul", "Add", "Neg"]),
        # a factor of the adapter's own where the rows' would be
        (CHANGED.replace("rows", '"l.adapter_scale"'), ("y",), ["MatMul", "Mul", "MatMul", "Add"]),
        # another input
        (CHANGED.replace("MatMul(x", "MatMul(other").replace("plain =", "other = Neg(x) plain ="), ("y",), None),
    ],
    ids=["read twice", "not the rows", "another input"],
)
def test_a_change_of_another_form_stays(lines: str, outputs: tuple[str, ...], expected: list[str] | None) -> None:
    model = model_of(lines, outputs)
    before = run(model, **feed(model))
    assert fuse_quantized_matmul(model) == 1
    assert "QuantizedMatMulLowRank" not in kinds(model)
    assert "QuantizedMatMul" in kinds(model)
    if expected is not None:
        assert [kind for kind in kinds(model) if kind != "QuantizedMatMul"] == expected
    for new, old in zip(run(model, **feed(model)), before, strict=True):
        np.testing.assert_allclose(new, old, atol=1e-5)


@pytest.mark.parametrize(
    "line",
    [
        product(accuracy_level=0),
        product("x, w16, s16", block_size=16),
    ],
    ids=["float compute", "small blocks"],
)
def test_products_that_the_kernel_has_not_stay(line: str) -> None:
    model = model_of(f"y = {line}")
    assert fuse_quantized_matmul(model) == 0
    assert kinds(model) == ["MatMulNBits"]
    assert not model.functions


def test_scales_are_stored_in_float16_only_where_nothing_is_lost() -> None:
    exact = CONSTANTS["s"].astype(np.float16).astype(np.float32)
    for scales, dtype in ((exact, ir.DataType.FLOAT16), (exact * np.float32(1.0001), ir.DataType.FLOAT)):
        model = model_of(f"y = {product()}")
        model.graph.initializers["s"].const_value = ir.tensor(scales, name="s")
        before = run(model, **feed(model))
        assert fuse_quantized_matmul(model) == 1
        assert kinds(model) == ["QuantizedMatMul"]
        (stored,) = [value for name, value in model.graph.initializers.items() if name.startswith("s")]
        assert stored.dtype == dtype
        np.testing.assert_array_equal(run(model, **feed(model))[0], before[0])


GATED = f"""
    gate = {product()}
    up = {product("x, w2, s")}
    active = com.microsoft.QuickGelu<alpha=1.0>(gate)
    y = Mul(active, up)
"""


def test_swiglu_becomes_one_node_that_any_onnxruntime_runs() -> None:
    model = model_of(GATED)
    before = run(model, **feed(model))
    assert fuse_quantized_matmul(model) == 2
    assert fuse_quantized_swiglu(model) == 1
    assert kinds(model) == ["QuantizedSwiGLU"]
    onnx.checker.check_model(ir.to_proto(model))
    np.testing.assert_allclose(run(model, **feed(model))[0], before[0], atol=1e-5)


@pytest.mark.parametrize(
    ("lines", "outputs"),
    [
        (GATED.replace("alpha=1.0", "alpha=1.702"), ("y",)),
        (GATED + " z = Neg(active)", ("y", "z")),
        (
            GATED.replace("up = com.microsoft.MatMulNBits", "other = Neg(x) up = com.microsoft.MatMulNBits").replace(
                "(x, w2", "(other, w2"
            ),
            ("y",),
        ),
        ("active = com.microsoft.QuickGelu<alpha=1.0>(x) up = " + product() + " y = Mul(active, up)", ("y",)),
    ],
    ids=["gelu", "read twice", "another input", "no product"],
)
def test_other_gates_stay(lines: str, outputs: tuple[str, ...]) -> None:
    model = model_of(lines, outputs)
    fuse_quantized_matmul(model)
    before = kinds(model)
    assert fuse_quantized_swiglu(model) == 0
    assert kinds(model) == before


def attention_model(
    dtype: str = "float", size: int = 16, attributes: str = "", more: str = "", news: str = "news"
) -> ir.Model:
    cache = f"{dtype}[b,1,p,{size}]"
    inputs = f"{dtype}[b,t,{3 * size}] qkv, {cache} past_key, {cache} past_value, int32[b] lengths, int32 total"
    inputs += f", int32[b] news, {dtype}[1,1,t,n] bias"
    operands = f'qkv, "", "", past_key, past_value, lengths, total, "", "", "", {more or chr(34) * 2}'
    operands += f', "", "", "", "", "", {news}' if news else ""
    call = f"com.microsoft.GroupQueryAttention<num_heads=1, kv_num_heads=1, scale=0.25{attributes}>({operands})"
    return graph(f"g ({inputs}) => ({dtype}[b,t,{size}] y, {cache} k, {cache} v) {{ y, k, v = {call} }}")


def test_plain_attention_becomes_the_projects_operator() -> None:
    model = attention_model()
    assert use_own_attention(model) == 1
    assert [(node.domain, node.op_type) for node in model.graph] == [("imsm", "GroupQueryAttention")]
    assert [value.name for value in model.graph.outputs] == ["y", "k", "v"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"dtype": "float16"},
        {"size": 24},
        {"attributes": ", softcap=30.0"},
        {"more": "bias"},
        {"news": ""},
    ],
    ids=["float16", "size", "soft-capping", "bias", "portable"],
)
def test_other_attention_stays(arguments: dict[str, str]) -> None:
    model = attention_model(**arguments)  # type: ignore[arg-type]
    assert use_own_attention(model) == 0
    assert [node.domain for node in model.graph] == ["com.microsoft"]
    assert not model.functions
