"""The adapter's matrices in half the bytes, and which stay."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir

from export.passes.half_adapter import SMALL, TOO_LARGE, store_adapter_in_half
from export.passes.rewrite import Outcome
from tests.graphs import graph, kinds, run, with_weight


def test_the_adapters_large_matrices_alone_are_stored_in_half() -> None:
    generator = np.random.default_rng(0)
    names = {"layer.adapter_a": (64, 32), "layer.weight": (64, 32), "small.adapter_b": (32, 4)}
    model = graph(
        """g (float[b, 64] x, float[64, 32] a, float[64, 32] w, float[32, 4] s) => (float[b, 4] y)
        { l = MatMul(x, a)
          f = MatMul(x, w)
          t = Add(l, f)
          y = MatMul(t, s) }"""
    )
    for short, (name, shape) in zip(("a", "w", "s"), names.items(), strict=True):
        with_weight(model, short, generator.standard_normal(shape).astype(np.float32))
        value = model.graph.initializers.pop(short)
        value.name = name
        model.graph.register_initializer(value)
    x = generator.standard_normal((3, 64)).astype(np.float32)
    before = run(model, x=x)[0]
    assert store_adapter_in_half(model) == Outcome(1, Counter({SMALL.reason: 1}))
    kinds = {str(value.name): value.dtype for value in model.graph.initializers.values()}
    assert kinds.pop("layer.adapter_a.fp16") == ir.DataType.FLOAT16
    assert set(kinds.values()) == {ir.DataType.FLOAT}
    np.testing.assert_allclose(run(model, x=x)[0], before, atol=0.3, rtol=1e-2)


def test_values_too_large_for_float16_stay_in_float32() -> None:
    model = graph(
        'g (float[b, 64] x, float[64, 32] "l.adapter_a") => (float[b, 32] y) { y = MatMul(x, "l.adapter_a") }'
    )
    with_weight(model, "l.adapter_a", np.full((64, 32), 7e4, np.float32))
    assert store_adapter_in_half(model) == Outcome(0, Counter({TOO_LARGE.reason: 1}))
    assert kinds(model) == ["MatMul"]
