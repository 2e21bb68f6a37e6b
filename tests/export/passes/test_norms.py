"""RMS norms as one node, and what is not one."""

from __future__ import annotations

import numpy as np

from export.passes.norms import fuse_rms_norm, fuse_skip_rms_norm
from export.passes.rewrite import Outcome
from tests.graphs import graph, kinds, run

X = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
RMS = """g (float[2, 3, 8] x, float[2, 3, 8] r) => (float[2, 3, 8] y, float[2, 3, 8] s)
    <float[8] scale = {1, 2, 3, 4, 5, 6, 7, 8}, float two = {2}, float eps = {0.000001}, int64[1] last = {-1}>
    { s = Add(x, r)
      p = Pow(s, two)
      m = ReduceMean<keepdims = 1, noop_with_empty_axes = 0>(p, last)
      e = Add(m, eps)
      q = Sqrt(e)
      i = Reciprocal(q)
      n = Mul(s, i)
      y = Mul(scale, n) }"""


def test_rms_norms_of_a_residual_sum_become_one_node_with_the_same_numbers() -> None:
    model = graph(RMS)
    before = run(model, x=X, r=X[::-1].copy())
    assert fuse_rms_norm(model) == Outcome(1)
    assert fuse_skip_rms_norm(model) == Outcome(1)
    assert kinds(model) == ["SkipSimplifiedLayerNormalization"]
    for found, expected in zip(run(model, x=X, r=X[::-1].copy()), before, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_norm_whose_weight_is_float32_beside_half_precision_computes_in_float32() -> None:
    text = RMS.replace("(float[2, 3, 8] x, float[2, 3, 8] r)", "(float16[2, 3, 8] x, float16[2, 3, 8] r)")
    text = text.replace("float[2, 3, 8] s)", "float16[2, 3, 8] s)").replace(
        "p = Pow(s, two)", "c = Cast<to = 1>(s)  p = Pow(c, two)"
    )
    model = graph(text.replace("Mul(s, i)", "Mul(c, i)"))
    x, r = X.astype(np.float16), X[::-1].astype(np.float16)
    before = run(model, x=x, r=r)
    assert fuse_rms_norm(model) == Outcome(1)
    assert fuse_skip_rms_norm(model) == Outcome(0)
    assert kinds(model).count("SimplifiedLayerNormalization") == 1
    for found, expected in zip(run(model, x=x, r=r), before, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_norm_over_another_exponent_is_not_an_rms_norm() -> None:
    model = graph(RMS.replace("two = {2}", "two = {3}"))
    assert fuse_rms_norm(model) == Outcome(0)


def test_a_norm_that_scales_in_another_type_keeps_the_sum_apart() -> None:
    """Gemma in half precision: SkipSimplifiedLayerNormalization has one type for all that it reads."""
    text = """g (float16[2, 3, 8] x, float16[2, 3, 8] r, {scale}[8] w) => ({scale}[2, 3, 8] y)
        {{ s = Add(x, r)
          y = SimplifiedLayerNormalization<axis = -1, stash_type = 1>(s, w) }}"""
    mixed = graph(text.format(scale="float"))
    assert fuse_skip_rms_norm(mixed) == Outcome(0)
    alike = graph(text.format(scale="float16"))
    assert fuse_skip_rms_norm(alike) == Outcome(1)
    assert kinds(alike) == ["SkipSimplifiedLayerNormalization"]
