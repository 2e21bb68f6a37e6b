"""Nodes that CUDA has in float32 alone are computed in it."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

from export.cuda_kernels import cuda_kernels
from export.passes.rewrite import Outcome
from export.passes.widen import widen_without_kernel
from tests.graphs import graph, kinds, run

X = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
PAD = """g (float[2, 3] x) => (float[2, 4] y) <int64[4] ends = {0, 0, 0, 1}>
    { h = Cast<to = 16>(x)
      p = Pad(h, ends)
      y = Cast<to = 1>(p) }"""


def test_a_bfloat16_node_that_cuda_lacks_computes_in_float32() -> None:
    model = graph(PAD)
    assert cuda_kernels(model).missing == {"Pad of T bfloat16": 1}
    assert widen_without_kernel(model) == Outcome(1)
    assert cuda_kernels(model).missing == {}
    assert kinds(model) == ["Cast", "Cast", "Pad", "Cast", "Cast"]
    expected = np.pad(X.astype(ml_dtypes.bfloat16).astype(np.float32), ((0, 0), (0, 1)))
    np.testing.assert_array_equal(run(model, x=X)[0], expected)


def test_outputs_that_are_not_in_half_precision_stay() -> None:
    model = graph(
        """g (bfloat16[2, 8] x) => (bfloat16[2, 3] values, int64[2, 3] indices) <int64[1] k = {3}>
        { values, indices = TopK(x, k) }"""
    )
    assert widen_without_kernel(model) == Outcome(1)
    assert cuda_kernels(model).missing == {}
    assert kinds(model) == ["Cast", "TopK", "Cast"]
    assert [(value.name, value.dtype) for value in model.graph.outputs] == [
        ("values", ir.DataType.BFLOAT16),
        ("indices", ir.DataType.INT64),
    ]


def test_a_norm_that_scales_in_float32_reads_float32() -> None:
    model = graph("g (bfloat16[2, 8] x, float[8] w) => (float[2, 8] y) { y = SimplifiedLayerNormalization(x, w) }")
    assert widen_without_kernel(model) == Outcome(1)
    assert kinds(model) == ["Cast", "SimplifiedLayerNormalization"]
    assert cuda_kernels(model).missing == {}


def test_what_has_a_kernel_or_none_at_all_stays() -> None:
    model = graph("g (float16[2, 3] x) => (float16[2, 4] y) <int64[4] ends = {0, 0, 0, 1}> { y = Pad(x, ends) }")
    assert widen_without_kernel(model) == Outcome(0)
    half, cache = "bfloat16[1, 1, 8]", "float16[1, 1, 4, 8]"
    lacking = graph(
        f"""g ({half} q, {half} k, {half} v, {cache} a, {cache} b, int32[1] n, int32 m) => ({half} y)
        {{ y, c, d = com.microsoft.GroupQueryAttention <num_heads = 1, kv_num_heads = 1> (q, k, v, a, b, n, m) }}"""
    )
    outcome = widen_without_kernel(lacking)
    assert outcome.fired == 0
    assert list(outcome.declined) == ["CUDA has no GroupQueryAttention in float32 either"]
    full = graph("g (float[2, 3] x) => (float[2, 3] y) { y = Mish(x) }")
    assert widen_without_kernel(full) == Outcome(0)
