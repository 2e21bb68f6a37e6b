"""Weights in the layout that they are multiplied in: transposed in the file, or multiplied transposed where tied."""

from __future__ import annotations

import numpy as np
import pytest

from export.errors import TraceError
from export.passes.rewrite import Outcome
from export.passes.weight_layout import lay_out_weights, weights_are_laid_out
from tests.graphs import graph, kinds, run, with_weight

X = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
W = np.random.default_rng(1).standard_normal((5, 8)).astype(np.float32)


def test_an_unshared_weight_is_transposed_in_the_file() -> None:
    model = with_weight(
        graph("g (float[2, 3, 8] x, float[5, 8] w) => (float[2, 3, 5] y) { t = Transpose(w)  y = MatMul(x, t) }"),
        "w",
        W,
    )
    assert lay_out_weights(model) == Outcome(1)
    assert kinds(model) == ["MatMul"]
    assert list(model.graph.initializers) == ["w.transposed"]
    np.testing.assert_allclose(run(model, x=X)[0], X @ W.T, rtol=1e-5, atol=1e-5)


def test_a_tied_weight_is_stored_once_and_multiplied_transposed() -> None:
    model = with_weight(
        graph(
            """g (int64[2, 3] i, float[5, 8] w) => (float[2, 3, 5] y)
            { e = Gather(w, i)
              t = Transpose<perm = [1, 0]>(w)
              y = MatMul(e, t) }"""
        ),
        "w",
        W,
    )
    indices = np.array([[0, 4, 2], [1, 1, 3]])
    assert lay_out_weights(model) == Outcome(1)
    assert kinds(model) == ["Gather", "FusedMatMul"]
    assert list(model.graph.initializers) == ["w"]
    assert model.graph.outputs[0].name == "y"
    np.testing.assert_allclose(run(model, i=indices)[0], W[indices] @ W.T, rtol=1e-5, atol=1e-5)


def test_transposes_of_computed_values_stay() -> None:
    model = graph("g (float[5, 8] x) => (float[8, 5] y) { a = Abs(x)  y = Transpose(a) }")
    assert lay_out_weights(model) == Outcome(0)
    assert kinds(model) == ["Abs", "Transpose"]


def test_a_tied_weight_read_by_something_other_than_matmul_is_an_error() -> None:
    model = with_weight(
        graph(
            """g (float[5, 8] w) => (float[5, 8] a, float[8, 5] y)
            { a = Abs(w)
              t = Transpose<perm = [1, 0]>(w)
              y = Neg(t) }"""
        ),
        "w",
        W,
    )
    with pytest.raises(TraceError, match="w is read by Neg"):
        lay_out_weights(model)


def test_a_weight_left_in_pytorchs_layout_is_reported() -> None:
    model = with_weight(graph("g (float[5, 8] w) => (float[8, 5] y) { t = Transpose(w) y = Abs(t) }"), "w", W)
    problem = weights_are_laid_out(model)
    assert problem is not None
    assert problem.startswith("1 weights are still transposed")
    lay_out_weights(model)
    assert weights_are_laid_out(model) is None
