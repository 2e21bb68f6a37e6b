"""What onnxscript's optimizer folds, what it leaves to the passes, and which of its rules is left out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnxscript import optimizer, rewriter

from export.simplify import simplify
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
    simplify(model)
    assert kinds(model) == ["Transpose", "MatMul", "Mul"]
    assert next(iter(model.graph)).inputs[0] is model.graph.initializers["model.q.weight"]
    np.testing.assert_array_equal(run(model, x=X)[0], before[0])


def test_the_rule_that_walks_the_whole_graph_at_every_node_never_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: set[str | None] = set()
    try_rewrite = rewriter.RewriteRule.try_rewrite

    def noted(rule: rewriter.RewriteRule, *args: Any, **kwargs: Any) -> Any:
        ran.add(rule.name)
        return try_rewrite(rule, *args, **kwargs)

    monkeypatch.setattr(rewriter.RewriteRule, "try_rewrite", noted)
    text = """g (float[2, 32] x) => (float[2, 32] z)
        { y = Identity(x)
          z = Add(y, x) }"""
    optimizer.optimize_ir(graph(text))
    default = set(ran)
    assert "SlicesSplit" in default
    ran.clear()
    simplify(graph(text))
    assert default - ran == {"SlicesSplit"}
    ran.clear()
    optimizer.optimize_ir(graph(text))
    assert ran == default  # other users of onnxscript in this process have all rules
