"""SiLU (swish) as one node: Mul(x, Sigmoid(x)) -> com.microsoft.QuickGelu with alpha 1, which is x * sigmoid(x)."""

from __future__ import annotations

import onnx_ir as ir

from . import weights


def fuse_silu(model: ir.Model) -> int:
    """Returns how many were fused."""
    count = 0
    for node in list(model.graph):
        if node.op_type != "Sigmoid":
            continue
        x, uses = node.inputs[0], list(node.outputs[0].uses())
        if x is None or len(uses) != 1 or uses[0][0].op_type != "Mul" or x not in uses[0][0].inputs:
            continue
        product = uses[0][0]
        fused = ir.node("QuickGelu", [x], attributes={"alpha": 1.0}, domain="com.microsoft", num_outputs=1)
        model.graph.insert_before(product, fused)
        weights.replace_value(product.outputs[0], fused.outputs[0])
        model.graph.remove(product, safe=True)
        model.graph.remove(node, safe=True)
        count += 1
    return count
