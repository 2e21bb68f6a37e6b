"""SiLU as one node."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from export.passes.rewrite import Declined, Outcome
from export.passes.silu import READ_TWICE, fuse_silu
from tests.graphs import graph, kinds, run

X = np.random.default_rng(0).standard_normal((2, 3, 32)).astype(np.float32)


@pytest.mark.parametrize("operands", ["x, s", "s, x"])
def test_a_value_times_its_sigmoid_is_one_node(operands: str) -> None:
    model = graph(f"g (float[2, 3, 32] x) => (float[2, 3, 32] z) {{ s = Sigmoid(x) z = Mul({operands}) }}")
    before = run(model, x=10 * X)
    assert fuse_silu(model) == Outcome(1)
    assert kinds(model) == ["QuickGelu"]
    assert [value.name for value in model.graph.outputs] == ["z"]
    np.testing.assert_allclose(run(model, x=10 * X)[0], before[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("lines", "declined"),
    [
        ("s = Sigmoid(x) m = Mul(x, s) z = Add(m, s)", [READ_TWICE]),
        ("s = Sigmoid(x) z = Mul(s, y)", []),
        ("s = Sigmoid(x) z = Mul(s, s)", []),
    ],
    ids=["two readers", "another value", "squared"],
)
def test_other_sigmoids_stay(lines: str, declined: list[Declined]) -> None:
    model = graph(f"g (float[2, 3, 32] x, float[2, 3, 32] y) => (float[2, 3, 32] z) {{ {lines} }}")
    before = kinds(model)
    assert fuse_silu(model) == Outcome(0, Counter(why.reason for why in declined))
    assert kinds(model) == before


def test_a_sigmoid_that_is_an_output_stays() -> None:
    model = graph("g (float[2, 3, 32] x) => (float[2, 3, 32] z, float[2, 3, 32] s) { s = Sigmoid(x) z = Mul(x, s) }")
    assert fuse_silu(model) == Outcome(0, Counter({READ_TWICE.reason: 1}))
    assert kinds(model) == ["Sigmoid", "Mul"]
