"""Weights of more dimensions that the graph only rearranges."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from export.passes.fold_layout import COMPUTED, COPIES, READ_TWICE, fold_layout
from export.passes.rewrite import Declined, Outcome
from tests.graphs import graph, kinds, run, with_weight

X = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
EXPERTS = np.random.default_rng(2).standard_normal((2, 6, 8)).astype(np.float32)
INTERLEAVED = """g (float[2, 6, 8] w, float[b, 8] x) => (float[2, b, 6] y)
    <int64[4] halves = {2, 2, 3, 8}, int64[3] rows = {2, 6, 8}>
    { h = Reshape(w, halves)
      t = Transpose<perm = [0, 2, 1, 3]>(h)
      r = Reshape(t, rows)
      p = Transpose<perm = [0, 2, 1]>(r)
      y = MatMul(x, p) }"""


def test_a_weight_that_is_only_rearranged_is_rearranged_in_the_file() -> None:
    model = with_weight(graph(INTERLEAVED), "w", EXPERTS)
    before = run(model, x=X)
    assert fold_layout(model) == Outcome(4)
    assert kinds(model) == ["MatMul"]
    floats = [value for value in model.graph.initializers.values() if value.dtype == ir.DataType.FLOAT]
    assert [list(value.shape or ()) for value in floats] == [[2, 8, 6]]
    np.testing.assert_array_equal(run(model, x=X)[0], before[0])


def test_a_weight_that_is_read_in_two_layouts_is_stored_once() -> None:
    twice = INTERLEAVED.replace("h = Reshape(w, halves)", "h = Reshape(w, halves)\n a = Abs(w)")
    assert fold_layout(with_weight(graph(twice), "w", EXPERTS)) == Outcome(0, Counter({READ_TWICE.reason: 1}))


def test_an_input_is_not_rearranged() -> None:
    assert fold_layout(graph(INTERLEAVED)) == Outcome()


def test_a_transpose_without_axes_reverses_them() -> None:
    text = "g (float[2, 6, 8] w, float[8, 2, 3] x) => (float[8, 6, 3] y) { t = Transpose(w) y = MatMul(t, x) }"
    model = with_weight(graph(text), "w", EXPERTS)
    x = np.random.default_rng(3).standard_normal((8, 2, 3)).astype(np.float32)
    before = run(model, x=x)
    assert fold_layout(model) == Outcome(1)
    np.testing.assert_array_equal(run(model, x=x)[0], before[0])


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("s = Shape(x) y = Reshape(w, s)", COMPUTED),
        ("y = Reshape(w, kept)", COPIES),
    ],
    ids=["computed", "copied"],
)
def test_a_shape_that_is_not_known_before_it_runs_stays(lines: str, reason: Declined) -> None:
    text = f"g (float[2, 6, 8] w, float[2, 48] x) => (float[2, 48] y) <int64[2] kept = {{0, 48}}> {{ {lines} }}"
    model = with_weight(graph(text), "w", EXPERTS)
    before = kinds(model)
    assert fold_layout(model) == Outcome(0, Counter({reason.reason: 1}))
    assert kinds(model) == before
