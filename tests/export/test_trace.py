"""What the trace folds, and what it leaves to the passes."""

from __future__ import annotations

import numpy as np
from onnxscript import optimizer

from export.trace import _should_fold
from tests.export.passes.projections import WEIGHTS, X
from tests.graphs import graph, kinds, run, with_weight


def test_a_traced_weight_keeps_its_name_and_its_layout_while_other_constants_are_folded() -> None:
    text = """g (float[2, 3, 32] x, float[32, 32] "model.q.weight") => (float[2, 3, 32] z)
        <float one = {1}, float two = {2}>
        { t = Transpose<perm = [1, 0]>("model.q.weight")
          p = MatMul(x, t)
          three = Add(one, two)
          z = Mul(p, three) }"""
    model = with_weight(graph(text), "model.q.weight", WEIGHTS["model.q.weight"])
    before = run(model, x=X)
    optimizer.optimize_ir(model, should_fold=_should_fold)
    assert kinds(model) == ["Transpose", "MatMul", "Mul"]
    assert next(iter(model.graph)).inputs[0] is model.graph.initializers["model.q.weight"]
    np.testing.assert_array_equal(run(model, x=X)[0], before[0])
