"""onnxscript's optimizer on a traced graph, before the passes of this package."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import optimizer, rewriter
from onnxscript.rewriter.rules.common import slice_split_rule

from .replaced import replaced

_RULES = "_DEFAULT_REWRITE_RULES"


def simplify(model: ir.Model) -> None:
    """Fold constants, inline functions and apply onnxscript's default rules, in place. All but `SlicesSplit`, which
    walks the whole graph at every node: nine tenths of the optimizer's time on 30 layers."""
    rules = [rule for rule in getattr(rewriter, _RULES) if rule.name != slice_split_rule.name]
    with replaced(rewriter, _RULES, tuple(rules)):
        optimizer.optimize_ir(model, should_fold=_should_fold)


def _should_fold(node: ir.Node) -> bool | None:
    """Everything constant as usual, but weights: the passes know them by their names and lay them out themselves."""
    weight = node.inputs[0] if node.op_type == "Transpose" else None
    return False if weight is not None and weight.is_initializer() else None
