"""Each pass on a small graph of its own: what it changes, that the numbers stay, and where it must not fire."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from export.errors import TraceError
from export.passes import run_passes
from export.passes.clean import drop_unused_inputs, strip_metadata
from export.passes.fold_layout import fold_layout
from export.passes.name_dimensions import name_dimensions
from export.passes.norms import fuse_rms_norm, fuse_skip_rms_norm
from export.passes.reshapes import merge_reshapes
from export.passes.weight_layout import lay_out_weights
from tests.graphs import graph, kinds, run, with_weight

X = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
W = np.random.default_rng(1).standard_normal((5, 8)).astype(np.float32)


def test_reshape_of_a_reshape_becomes_one() -> None:
    model = graph(
        """g (float[b, 3, 8] x) => (float[b, 24] y)
        <int64[4] heads = {-1, 3, 2, 4}, int64[2] flat = {-1, 24}>
        { h = Reshape(x, heads)
          y = Reshape(h, flat) }"""
    )
    before = run(model, x=X)
    assert merge_reshapes(model) == 1
    assert kinds(model) == ["Reshape"]
    np.testing.assert_array_equal(run(model, x=X)[0], before[0])


def test_reshape_to_the_shape_that_a_value_has_already_goes_away() -> None:
    model = graph(
        """g (float[2, 3, 8] x) => (float[2, 3, 8] y)
        <int64[4] heads = {2, 3, 2, 4}, int64[3] merged = {2, 3, 8}>
        { h = Reshape(x, heads)
          m = Reshape(h, merged)
          y = Abs(m) }"""
    )
    before = run(model, x=X)
    merge_reshapes(model)
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
    merge_reshapes(model)
    assert kinds(model).count("Reshape") == 3
    np.testing.assert_array_equal(run(model, x=X)[0], before[0])


def test_a_weight_of_its_own_is_transposed_in_the_file() -> None:
    model = with_weight(
        graph("g (float[2, 3, 8] x, float[5, 8] w) => (float[2, 3, 5] y) { t = Transpose(w)  y = MatMul(x, t) }"),
        "w",
        W,
    )
    assert lay_out_weights(model) == 1
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
    assert lay_out_weights(model) == 1
    assert kinds(model) == ["Gather", "FusedMatMul"]
    assert list(model.graph.initializers) == ["w"]
    assert model.graph.outputs[0].name == "y"
    np.testing.assert_allclose(run(model, i=indices)[0], W[indices] @ W.T, rtol=1e-5, atol=1e-5)


def test_transposes_of_computed_values_stay() -> None:
    model = graph("g (float[5, 8] x) => (float[8, 5] y) { a = Abs(x)  y = Transpose(a) }")
    assert lay_out_weights(model) == 0
    assert kinds(model) == ["Abs", "Transpose"]


def test_a_tied_weight_read_by_something_else_than_matmul_is_an_error() -> None:
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
    assert fuse_rms_norm(model) == 1
    assert fuse_skip_rms_norm(model) == 1
    assert kinds(model) == ["SkipSimplifiedLayerNormalization"]
    for found, expected in zip(run(model, x=X, r=X[::-1].copy()), before, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_norm_over_another_exponent_is_not_an_rms_norm() -> None:
    model = graph(RMS.replace("two = {2}", "two = {3}"))
    assert fuse_rms_norm(model) == 0


def test_inputs_that_nothing_reads_are_dropped_and_read_ones_stay() -> None:
    model = graph(
        "g (float[2, 3, 8] x, int64[2] unused, float[2] dead) => (float[2, 3, 8] y) { d = Abs(dead) y = Neg(x) }"
    )
    assert drop_unused_inputs(model) == 2
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert kinds(model) == ["Neg"]


def test_dimensions_get_their_names_and_fixed_sizes_stay() -> None:
    model = graph(
        """g (int64[s1, s2] input_ids, float[s1, 2, s3, 16] past, float[s9] other)
        => (float[s1, 2, s3, 16] present, float[s9] logits_like)
        { present = Abs(past)  logits_like = Abs(other) }"""
    )
    model.graph.inputs[1].name = "past_key_values.base.0.key"
    model.graph.outputs[0].name = "present.base.0.key"
    assert name_dimensions(model) == 3
    shapes = {value.name: str(value.shape) for value in (*model.graph.inputs, *model.graph.outputs)}
    assert shapes["input_ids"] == "[batch,sequence]"
    assert shapes["past_key_values.base.0.key"] == "[batch,2,past_base,16]"
    assert shapes["present.base.0.key"] == "[batch,2,total_base,16]"
    assert shapes["other"] == "[s9]"


def test_notes_of_the_exporting_machine_are_stripped() -> None:
    model = graph("g (float[5, 8] x) => (float[5, 8] y) { a = Abs(x) y = Neg(a) }")
    node = next(iter(model.graph))
    node.metadata_props["pkg.torch.onnx.stack_trace"] = "/home/somebody/secret.py"
    node.doc_string = "/home/somebody"
    strip_metadata(model)
    assert b"somebody" not in ir.to_proto(model).SerializeToString()


def test_a_weight_left_in_pytorchs_layout_fails_the_whole_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_weight(graph("g (float[5, 8] w) => (float[8, 5] y) { y = Transpose(w) }"), "w", W)
    monkeypatch.setattr("export.passes.PASSES", ())
    with pytest.raises(TraceError, match="1 weights are still transposed"):
        run_passes(model)


EXPERTS = np.random.default_rng(2).standard_normal((2, 6, 8)).astype(np.float32)
INTERLEAVED = """g (float[2, 6, 8] w, float[b, 8] x) => (float[2, b, 6] y)
    <int64[4] halves = {2, 2, 3, 8}, int64[3] rows = {2, 6, 8}>
    { h = Reshape(w, halves)
      t = Transpose<perm = [0, 2, 1, 3]>(h)
      r = Reshape(t, rows)
      p = Transpose<perm = [0, 2, 1]>(r)
      y = MatMul(x, p) }"""


def test_a_weight_that_is_only_laid_out_anew_is_laid_out_in_the_file() -> None:
    model = with_weight(graph(INTERLEAVED), "w", EXPERTS)
    before = run(model, x=X[0])
    assert fold_layout(model) == 4
    assert kinds(model) == ["MatMul"]
    assert [value.shape.numpy() for value in model.graph.initializers.values() if value.dtype == ir.DataType.FLOAT] == [
        (2, 8, 6)
    ]
    np.testing.assert_array_equal(run(model, x=X[0])[0], before[0])


def test_a_weight_that_is_read_in_two_layouts_is_stored_once() -> None:
    twice = INTERLEAVED.replace("h = Reshape(w, halves)", "h = Reshape(w, halves)\n a = Abs(w)")
    assert fold_layout(with_weight(graph(twice), "w", EXPERTS)) == 0


def test_an_input_is_not_laid_out() -> None:
    assert fold_layout(graph(INTERLEAVED)) == 0
