"""Reshapes of reshapes: what becomes one, what goes away, and what stays."""

from __future__ import annotations

from collections import Counter

import numpy as np

from export.passes.reshapes import COPIES, merge_reshapes
from export.passes.rewrite import Outcome
from tests.graphs import graph, kinds, run

X = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)


def test_reshape_of_a_reshape_becomes_one() -> None:
    model = graph(
        """g (float[b, 3, 8] x) => (float[b, 24] y)
        <int64[4] heads = {-1, 3, 2, 4}, int64[2] flat = {-1, 24}>
        { h = Reshape(x, heads)
          y = Reshape(h, flat) }"""
    )
    before = run(model, x=X)
    assert merge_reshapes(model) == Outcome(1)
    assert kinds(model) == ["Reshape"]
    np.testing.assert_array_equal(run(model, x=X)[0], before[0])


def test_reshape_to_the_shape_that_a_value_already_has_goes_away() -> None:
    model = graph(
        """g (float[2, 3, 8] x) => (float[2, 3, 8] y)
        <int64[4] heads = {2, 3, 2, 4}, int64[3] merged = {2, 3, 8}>
        { h = Reshape(x, heads)
          m = Reshape(h, merged)
          y = Abs(m) }"""
    )
    before = run(model, x=X)
    assert merge_reshapes(model) == Outcome(1)
    assert kinds(model) == ["Abs"]
    np.testing.assert_array_equal(run(model, x=X)[0], before[0])


def test_reshape_that_copies_a_dimension_stays() -> None:
    model = graph(
        """g (float[b, 3, 8] x) => (float[b, c] y)
        <int64[3] turned = {-1, 8, 3}, int64[3] kept = {0, 2, -1}, int64[2] flat = {0, -1}>
        { h = Reshape(x, turned)
          k = Reshape(h, kept)
          y = Reshape(k, flat) }"""
    )
    before = run(model, x=X)
    assert merge_reshapes(model) == Outcome(0, Counter({COPIES.reason: 2}))
    assert kinds(model).count("Reshape") == 3
    np.testing.assert_array_equal(run(model, x=X)[0], before[0])
