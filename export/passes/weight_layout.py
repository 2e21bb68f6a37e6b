"""Weights in the layout that they are multiplied in.

PyTorch keeps a linear layer's weight as (out, in) and the trace multiplies by its transpose. A weight that nothing
else reads is transposed in the file, once. A weight that is also read as it is, a tied embedding, stays and is
multiplied by `FusedMatMul` with transB, so that it is stored once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx_ir as ir

from ..errors import TraceError
from . import weights
from .graph import add_node, drop_unused, new_weight, nodes_of, replace_value
from .rewrite import Rewrite

Layout = Callable[[weights.Array], weights.Array]


def replace_laid_out(graph: ir.Graph, nodes: Sequence[ir.Node], weight: ir.Value, suffix: str, layout: Layout) -> None:
    """Put a weight that is laid out in the file in the place of nodes that lay it out in the graph, its only
    readers."""
    original = weight.const_value
    assert original is not None
    # A view of no memory has the shape that the result will have.
    shape = layout(np.broadcast_to(np.zeros((), np.int8), original.shape.numpy())).shape
    value = new_weight(graph, f"{weight.name}.{suffix}", lambda: layout(original.numpy()), shape, original.dtype)
    weights.note_parts(value, weights.parts(weight))
    for node in nodes:
        node.outputs[0].replace_all_uses_with(value)
        graph.remove(node, safe=True)
    drop_unused(graph, [weight])


def weights_are_laid_out(model: ir.Model) -> str | None:
    """What is wrong if one is left in PyTorch's layout, which would make onnxruntime transpose it at every start."""
    left = [node.name for node in model.graph if _transposes_a_weight(node)]
    return f"{len(left)} weights are still transposed in the graph, the first by {left[0]}" if left else None


def _candidates(model: ir.Model) -> Iterator[ir.Node]:
    return (node for node in nodes_of(model, "Transpose") if _transposes_a_weight(node))


def _transposes_a_weight(node: ir.Node) -> bool:
    """Whether the node is Transpose(weight, perm=[1, 0])."""
    weight = node.inputs[0] if node.op_type == "Transpose" else None
    if weight is None or not weight.is_initializer() or weight.const_value is None:
        return False
    return list(node.attributes.get_ints("perm", [])) in ([1, 0], []) and len(weight.const_value.shape) == 2


def _rewrite(model: ir.Model, node: ir.Node) -> None:
    weight = node.inputs[0]
    assert weight is not None
    readers = [user for user, _ in weight.uses()]
    if all(_transposes_a_weight(reader) for reader in readers):
        replace_laid_out(model.graph, readers, weight, "transposed", lambda array: array.T)
    else:
        _multiply_transposed(model.graph, node, weight)


def _multiply_transposed(graph: ir.Graph, node: ir.Node, weight: ir.Value) -> None:
    for user, index in list(node.outputs[0].uses()):
        if user.op_type != "MatMul" or index != 1:
            raise TraceError(f"the tied weight {weight.name} is read by {user.op_type}, not by MatMul")
        fused = add_node(user, "FusedMatMul", [user.inputs[0], weight], domain="com.microsoft", transB=1)
        name = user.outputs[0].name
        replace_value(user.outputs[0], fused.outputs[0])
        graph.remove(user, safe=True)
        fused.outputs[0].name = name
    graph.remove(node, safe=True)


lay_out_weights = Rewrite(
    "lay_out_weights",
    "MatMul(x, Transpose(weight)) -> MatMul(x, weight.T), or FusedMatMul(x, weight) with transB",
    _candidates,
    lambda node: node,
    _rewrite,
)
