"""Products of one input become one in half precision, with biases and low-rank changes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from export.passes import weights
from export.passes.low_rank import pack_low_rank
from export.passes.pack_products import ALONE, pack_products
from export.passes.projections import OTHER_LOWS, OTHER_TERM
from export.passes.rewrite import Outcome
from tests.export.passes.projections import MASK, SIZES, WEIGHTS, X
from tests.graphs import declared, graph, kinds, run, with_weights

HALF = {name: values.astype(np.float16) for name, values in WEIGHTS.items()}
SUM = "p = Neg(q) r = Exp(k) z = Concat<axis = -1>(p, r)"  # q is read before k is made
PLAIN = 'q = MatMul(x, "model.q.weight") k = MatMul(x, "model.k.weight")'
LOWS = "".join(f'{p}a = MatMul(x, "model.{p}.adapter_a") {p}l = Mul({p}a, mask) ' for p in "qk")
CHANGED = "".join(
    f'{p}w = MatMul(x, "model.{p}.weight") {p}c = MatMul({p}l, "model.{p}.adapter_b") {p} = Add({p}w, {p}c) '
    for p in "qk"
)


def made(lines: str, type_: str = "float16") -> ir.Model:
    text = f"""g ({type_}[2, 3, 32] x, {type_}[2, 1, 1] mask{declared(WEIGHTS, lines).replace("float", type_)})
        => ({type_}[2, 3, 48] z) {{ {lines} }}"""
    return with_weights(graph(text), HALF if type_ == "float16" else WEIGHTS)


def outputs(model: ir.Model) -> np.ndarray:
    names = [value.name for value in model.graph.inputs]
    given: dict[str, np.ndarray] = {"x": (X / 8).astype(np.float16), "mask": MASK.astype(np.float16)}
    (found,) = run(model, **{name: array for name, array in given.items() if name in names})
    return np.asarray(found)


@pytest.mark.parametrize(
    ("lines", "nodes"),
    [
        (PLAIN, ["MatMul", "Split"]),
        (
            'q = MatMul(x, "model.q.weight") kw = MatMul(x, "model.k.weight") k = Add("model.k.bias", kw)',
            ["MatMul", "Add", "Split"],
        ),
        (LOWS + CHANGED, ["MatMul", "Mul", "MatMul", "MatMul", "Add", "Split"]),
    ],
    ids=["plain", "a bias", "low-rank changes"],
)
def test_products_of_one_input_become_one(lines: str, nodes: list[str]) -> None:
    model = made(f"{lines} {SUM}")
    before = outputs(model)
    pack_low_rank(model)
    assert pack_products(model) == Outcome(1)
    assert kinds(model) == [*nodes, "Neg", "Exp", "Concat"]
    packed = model.graph.initializers["model.q.weight.joint"]
    assert weights.parts(packed) == ("model.q.weight", "model.k.weight")
    assert weights.part_sizes(packed, 48) == (SIZES["q"], SIZES["k"])
    np.testing.assert_allclose(outputs(model), before, rtol=0.01, atol=0.01)
    assert before.std() > 0.5
    assert pack_products(model) == Outcome()


@pytest.mark.parametrize(
    ("lines", "outcome"),
    [
        (LOWS + CHANGED, Outcome(0, Counter({OTHER_LOWS.reason: 2}))),  # whose As were not packed
        (
            PLAIN.replace('k = MatMul(x, "model.k.weight")', 'kw = MatMul(x, "model.k.weight") k = Add(kw, kw)'),
            Outcome(0, Counter({"a projection is read by something else too": 1, ALONE.reason: 1})),
        ),
        (
            'q = MatMul(x, "model.q.weight") kw = MatMul(x, "model.k.weight") k = Add(kw, "model.k.adapter_bias")',
            Outcome(0, Counter({OTHER_TERM.reason: 1, ALONE.reason: 1})),
        ),
    ],
    ids=["lows of their own", "a product read twice", "the adapter's bias"],
)
def test_other_products_stay_apart(lines: str, outcome: Outcome) -> None:
    model = made(f"{lines} {SUM}")
    before = kinds(model)
    assert pack_products(model) == outcome
    assert kinds(model) == before


def test_float32_is_for_cpus_where_a_split_is_a_copy() -> None:
    model = made(f"{PLAIN} {SUM}", "float")
    assert pack_products(model) == Outcome()
