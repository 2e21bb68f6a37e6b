"""When products become this project's own operator, with or without their low-rank change, and when not.

What its kernel computes is tested in tests/parity/test_kernels.py."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from export.passes.low_rank_change import CHANGE_READ_TWICE, COLUMNS_READ, OTHER_FORM, OTHER_INPUT, READ_TWICE, RESHAPED
from export.passes.quantized_matmul import FLOAT_COMPUTE, FLOAT_ZERO_POINTS, GROUPS, fuse_quantized_matmul
from export.passes.rewrite import Declined, Outcome
from tests.export.passes.quantized import CONSTANTS, feed, model_of, product
from tests.graphs import kinds, run

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
    assert fuse_quantized_matmul(model) == Outcome(1)
    assert kinds(model) == ["QuantizedMatMulLowRank"]
    assert sorted(model.graph.initializers) == ["l.adapter_a", "l.adapter_b", "s", "w"]
    onnx.checker.check_model(ir.to_proto(model))
    np.testing.assert_allclose(run(model, **feed(model))[0], before[0], atol=1e-5)


OTHER = CHANGED.replace("MatMul(x", "MatMul(other").replace("plain =", "other = Neg(x) plain =")
PACKED = f"""
    plain = {product()}
    low = MatMul(x, "l.adapter_two")
    kept = Mul(low, rows)
    first, second = Split<axis = -1>(kept, ranks)
    change = MatMul(first, "l.adapter_b")
    y = Add(plain, change)
"""


@pytest.mark.parametrize(
    ("lines", "outputs", "reason", "expected"),
    [
        (CHANGED + "z = Neg(plain)", ("y", "z"), READ_TWICE, ["MatMul", "Mul", "MatMul", "Add", "Neg"]),
        (CHANGED + "z = Neg(change)", ("y", "z"), CHANGE_READ_TWICE, ["MatMul", "Mul", "MatMul", "Add", "Neg"]),
        (CHANGED.replace("rows", '"l.adapter_scale"'), ("y",), OTHER_FORM, ["MatMul", "Mul", "MatMul", "Add"]),
        (CHANGED.replace("Mul(low, rows)", "Neg(low)"), ("y",), OTHER_FORM, ["MatMul", "Neg", "MatMul", "Add"]),
        (OTHER, ("y",), OTHER_INPUT, ["Neg", "MatMul", "Mul", "MatMul", "Add"]),
        (
            CHANGED.replace("plain =", "flat =").replace("low =", "plain = Reshape(flat, shape) low ="),
            ("y",),
            RESHAPED,
            ["Reshape", "MatMul", "Mul", "MatMul", "Add"],
        ),
        (
            PACKED + 'z = MatMul(second, "l.adapter_b")',
            ("y", "z"),
            COLUMNS_READ,
            ["MatMul", "Mul", "Split", "MatMul", "Add", "MatMul"],
        ),
    ],
    ids=["read twice", "change read twice", "not the rows", "no rows", "another input", "reshaped", "a part of one"],
)
def test_a_change_of_another_form_stays(
    lines: str, outputs: tuple[str, ...], reason: Declined, expected: list[str]
) -> None:
    model = model_of(lines, outputs)
    before = run(model, **feed(model))
    assert fuse_quantized_matmul(model) == Outcome(1, Counter({reason.reason: 1}))
    assert kinds(model).count("QuantizedMatMul") == 1
    assert [kind for kind in kinds(model) if kind != "QuantizedMatMul"] == expected
    for new, old in zip(run(model, **feed(model)), before, strict=True):
        np.testing.assert_allclose(new, old, atol=1e-5)


def test_a_sum_with_something_else_is_not_a_change_that_stays() -> None:
    model = model_of(f"plain = {product()} y = Add(plain, x)")
    assert fuse_quantized_matmul(model) == Outcome(1)
    assert kinds(model) == ["QuantizedMatMul", "Add"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (product(accuracy_level=0), FLOAT_COMPUTE),
        (product("x, w16, s16", block_size=16), Declined("4 bits in blocks of 16 have no operator")),
        (product("x, w, half"), Declined("its scales are float16")),
        (product("x, w, s, points"), FLOAT_ZERO_POINTS),
        (product('x, w, s, "", order'), GROUPS),
    ],
    ids=["float compute", "small blocks", "scales in half", "floating zero points", "an order of blocks"],
)
def test_products_without_a_kernel_stay(line: str, reason: Declined) -> None:
    model = model_of(f"y = {line}")
    assert fuse_quantized_matmul(model) == Outcome(0, Counter({reason.reason: 1}))
    assert kinds(model) == ["MatMulNBits"]
    assert not model.functions


def test_scales_are_stored_in_float16_only_where_nothing_is_lost() -> None:
    exact = CONSTANTS["s"].astype(np.float16).astype(np.float32)
    for scales, dtype in ((exact, ir.DataType.FLOAT16), (exact * np.float32(1.0001), ir.DataType.FLOAT)):
        model = model_of(f"y = {product()}")
        model.graph.initializers["s"].const_value = ir.tensor(scales, name="s")
        before = run(model, **feed(model))
        assert fuse_quantized_matmul(model) == Outcome(1)
        assert kinds(model) == ["QuantizedMatMul"]
        (stored,) = [value for name, value in model.graph.initializers.items() if name.startswith("s")]
        assert stored.dtype == dtype
        np.testing.assert_array_equal(run(model, **feed(model))[0], before[0])
