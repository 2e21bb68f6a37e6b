"""When SwiGLU becomes this project's operator, and when not.

What its kernel computes is tested in tests/parity/test_kernels.py."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from export.passes.quantized_matmul import fuse_quantized_matmul
from export.passes.quantized_swiglu import (
    NO_PRODUCTS,
    OTHER_ACTIVATION,
    OTHER_FORM,
    OTHER_INPUT,
    OTHER_ROWS,
    READ_TWICE,
    UNLIKE,
    fuse_quantized_swiglu,
)
from export.passes.rewrite import Declined, Outcome
from tests.export.passes.quantized import feed, model_of, product
from tests.graphs import kinds, run

GATED = f"""
    gate = {product()}
    up = {product("x, w2, s")}
    active = com.microsoft.QuickGelu<alpha=1.0>(gate)
    y = Mul(active, up)
"""


def test_swiglu_becomes_one_node_that_any_onnxruntime_runs() -> None:
    model = model_of(GATED)
    before = run(model, **feed(model))
    assert fuse_quantized_matmul(model) == Outcome(2)
    assert fuse_quantized_swiglu(model) == Outcome(1)
    assert kinds(model) == ["QuantizedSwiGLU"]
    onnx.checker.check_model(ir.to_proto(model))
    np.testing.assert_allclose(run(model, **feed(model))[0], before[0], atol=1e-5)


UP = "up = com.microsoft.MatMulNBits"


def changed(name: str, rows: str = "rows") -> str:
    """What a low-rank change adds to a product."""
    return f"""low_{name} = MatMul(x, "l.adapter_a") kept_{name} = Mul(low_{name}, {rows})
        change_{name} = MatMul(kept_{name}, "l.adapter_b") {name} = Add(plain_{name}, change_{name})"""


GATE_CHANGED = f"plain_gate = {product()} {changed('gate')} " + GATED[GATED.index("up =") :]
ROWS_DIFFER = f"""others = Neg(rows) plain_gate = {product()} {changed("gate")}
    plain_up = {product("x, w2, s")} {changed("up", "others")} {GATED[GATED.index("active") :]}"""


@pytest.mark.parametrize(
    ("lines", "outputs", "reason"),
    [
        (GATED.replace("alpha=1.0", "alpha=1.702"), ("y",), OTHER_ACTIVATION),
        (GATED + " z = Neg(active)", ("y", "z"), READ_TWICE),
        (GATED + " z = Neg(up)", ("y", "z"), READ_TWICE),
        (GATED.replace(UP, "other = Neg(x) " + UP).replace("(x, w2", "(other, w2"), ("y",), OTHER_INPUT),
        (
            "active = com.microsoft.QuickGelu<alpha=1.0>(x) up = " + product() + " y = Mul(active, up)",
            ("y",),
            NO_PRODUCTS,
        ),
        (GATED.replace(product("x, w2, s"), product("x, w64, s64", block_size=64)), ("y",), OTHER_FORM),
        (GATE_CHANGED, ("y",), UNLIKE),
        (ROWS_DIFFER, ("y",), OTHER_ROWS),
    ],
    ids=[
        "gelu",
        "read twice",
        "product read twice",
        "another input",
        "no product",
        "other blocks",
        "one change",
        "other rows",
    ],
)
def test_other_gates_stay(lines: str, outputs: tuple[str, ...], reason: Declined) -> None:
    model = model_of(lines, outputs)
    fuse_quantized_matmul(model)
    before = kinds(model)
    assert fuse_quantized_swiglu(model) == Outcome(0, Counter({reason.reason: 1}))
    assert kinds(model) == before


def test_a_product_of_two_values_is_not_a_gate() -> None:
    model = model_of(f"gate = {product()} y = Mul(gate, x)")
    fuse_quantized_matmul(model)
    assert fuse_quantized_swiglu(model) == Outcome()
