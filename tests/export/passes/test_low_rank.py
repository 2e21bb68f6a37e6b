"""The first products of low-rank changes in one, by input and by rows; the others stay."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from export.passes import weights
from export.passes.low_rank import ALONE, NO_ROWS, READ_TWICE, pack_low_rank
from export.passes.rewrite import Declined, Outcome
from tests.export.passes.projections import MASK, WEIGHTS, X, assert_same
from tests.graphs import declared, graph, kinds, run, with_weights


def low_rank(lines: str, outputs: str = "q, k") -> ir.Model:
    """Products of x and y with low-rank factors; two masks."""
    names = ", ".join(f"float[2, 3, r_{name}] {name}" for name in outputs.split(", "))
    text = (
        f"g (float[2, 3, 32] x, float[2, 3, 32] y, float[2, 1, 1] mask, float[2, 1, 1] other{declared(WEIGHTS, lines)})"
    )
    return with_weights(graph(f"{text} => ({names}) {{ {lines} }}"), WEIGHTS)


def run_low_rank(model: ir.Model) -> list[np.ndarray]:
    return run(model, x=X, y=X[::-1].copy(), mask=MASK, other=1 - MASK)


def lows(part: str, x: str = "x", mask: str = "mask") -> str:
    return f'p{part} = MatMul({x}, "model.{part}.adapter_a") {part} = Mul(p{part}, {mask})\n'


def test_first_products_of_low_rank_changes_become_one() -> None:
    model = low_rank(lows("q") + lows("k") + 'pv = MatMul(x, "model.v.adapter_a") v = Mul(mask, pv)', "q, k, v")
    before = run_low_rank(model)
    assert pack_low_rank(model) == Outcome(2)
    assert kinds(model) == ["MatMul", "Mul", "Split"]
    packed = model.graph.initializers["model.q.adapter_a.packed"]
    assert weights.parts(packed) == tuple(f"model.{part}.adapter_a" for part in "qkv")
    assert weights.is_adapter(packed)
    assert list(model.graph.initializers) == ["model.q.adapter_a.packed", "model.q.adapter_a.packed.ranks"]
    assert [value.name for value in model.graph.outputs] == ["q", "k", "v"]
    assert_same(run_low_rank(model), before)


def test_a_factor_that_layers_share_stays_for_the_one_that_is_not_packed() -> None:
    line = 'pz = MatMul(y, "model.q.adapter_a") v = Mul(pz, mask)'
    model = low_rank(lows("q") + lows("k") + line, "q, k, v")
    before = run_low_rank(model)
    assert pack_low_rank(model) == Outcome(1)
    assert "model.q.adapter_a" in model.graph.initializers
    assert_same(run_low_rank(model), before)


def test_layers_that_share_their_factors_are_packed_each() -> None:
    again = (
        'pv = MatMul(y, "model.q.adapter_a") v = Mul(pv, mask) pw = MatMul(y, "model.k.adapter_a") w = Mul(pw, mask)'
    )
    model = low_rank(lows("q") + lows("k") + again, "q, k, v, w")
    before = run_low_rank(model)
    assert pack_low_rank(model) == Outcome(2)
    assert {"model.q.adapter_a.packed", "model.q.adapter_a.packed.1"} < set(model.graph.initializers)
    assert_same(run_low_rank(model), before)


def test_products_are_packed_by_input() -> None:
    model = low_rank(
        lows("q") + lows("k") + 'a = MatMul(y, "model.v.adapter_a") v = Mul(a, mask)'
        'b = MatMul(y, "model.q.adapter_a") w = Mul(b, mask)',
        "q, k, v, w",
    )
    before = run_low_rank(model)
    assert pack_low_rank(model) == Outcome(2)
    assert sorted(kinds(model)) == ["MatMul"] * 2 + ["Mul"] * 2 + ["Split"] * 2
    assert_same(run_low_rank(model), before)


@pytest.mark.parametrize(
    ("lines", "declined"),
    [
        (lows("q") + lows("k", x="y"), []),
        (lows("q") + lows("k", mask="other"), [ALONE, ALONE]),
        (lows("q") + 'pk = MatMul(x, "model.k.weight") k = Mul(pk, mask)', []),
        (
            lows("q") + 'pk = MatMul(x, "model.k.adapter_a") m = Mul(pk, mask) n = Abs(pk) k = Add(m, n)',
            [READ_TWICE, ALONE],
        ),
        (lows("q") + 'pk = MatMul(x, "model.k.adapter_a") k = Add(pk, mask)', [NO_ROWS, ALONE]),
        (lows("q") + 'pk = MatMul(x, "model.q.adapter_delta") k = Mul(pk, y)', [NO_ROWS, ALONE]),
        (lows("q") + 'a = Abs("model.k.adapter_a") pk = MatMul(x, a) k = Mul(pk, mask)', []),
        (lows("q") + "k = Mul(x, mask)", []),
    ],
    ids=[
        "another input",
        "another mask",
        "the backbone's",
        "another reader",
        "no mask",
        "a factor for each value",
        "computed",
        "one alone",
    ],
)
def test_other_products_are_not_packed(lines: str, declined: list[Declined]) -> None:
    model = low_rank(lines)
    before = kinds(model)
    assert pack_low_rank(model) == Outcome(0, Counter(why.reason for why in declined))
    assert kinds(model) == before
