"""SiLU (swish) as one node."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from .graph import add_node, nodes_of, only_user, replace_value
from .rewrite import Declined, Rewrite

READ_TWICE = Declined("the sigmoid is read by something else too")


def _candidates(model: ir.Model) -> Iterator[ir.Node]:
    """Sigmoids that are multiplied with their own input."""
    for node in nodes_of(model, "Sigmoid"):
        x, users = node.inputs[0], node.outputs[0].uses()
        if any(user.op_type == "Mul" and x in user.inputs for user, _ in users):
            yield node


def _check(node: ir.Node) -> ir.Node | Declined:
    return READ_TWICE if only_user(node.outputs[0]) is None else node


def _rewrite(model: ir.Model, sigmoid: ir.Node) -> None:
    product = next(iter(sigmoid.outputs[0].uses()))[0]
    fused = add_node(product, "QuickGelu", [sigmoid.inputs[0]], domain="com.microsoft", alpha=1.0)
    replace_value(product.outputs[0], fused.outputs[0])
    model.graph.remove(product, safe=True)
    model.graph.remove(sigmoid, safe=True)


fuse_silu = Rewrite(
    "fuse_silu",
    "Mul(x, Sigmoid(x)) -> com.microsoft.QuickGelu(x) with alpha 1, which is x * sigmoid(x)",
    _candidates,
    _check,
    _rewrite,
)
