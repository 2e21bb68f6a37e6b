"""Weights in the layout that they are multiplied in.

PyTorch keeps a linear layer's weight as (out, in) and the trace multiplies by its transpose. A weight that nothing
else reads is transposed in the file, once. A weight that is also read as it is, a tied embedding, stays and is
multiplied by `FusedMatMul` with transB, so that it is stored once.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..errors import TraceError
from . import weights


def lay_out_weights(model: ir.Model) -> int:
    """Returns how many weights were laid out."""
    count = 0
    for node in list(model.graph):
        if transposes_a_weight(node):
            weight = node.inputs[0]
            assert weight is not None
            if all(transposes_a_weight(user) for user, _ in weight.uses()):
                _transpose_in_file(model.graph, weight)
            else:
                _multiply_transposed(model.graph, node)
            count += 1
    return count


def transposes_a_weight(node: ir.Node) -> bool:
    """Whether the node is Transpose(weight, perm=[1, 0])."""
    weight = node.inputs[0] if node.op_type == "Transpose" else None
    if weight is None or not weight.is_initializer() or weight.const_value is None:
        return False
    return list(node.attributes.get_ints("perm", [])) in ([1, 0], []) and len(weight.const_value.shape) == 2


def _transpose_in_file(graph: ir.Graph, weight: ir.Value) -> None:
    original = weight.const_value
    assert original is not None
    rows, columns = original.shape.numpy()
    name = f"{weight.name}.transposed"

    def transposed() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(original.numpy().T), name=name)

    shape = ir.Shape((columns, rows))
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(original.dtype))
    value.const_value = ir.LazyTensor(transposed, dtype=original.dtype, shape=shape, name=name)
    weights.note_parts(value, weights.parts(weight))
    graph.register_initializer(value)
    for node in [user for user, _ in weight.uses()]:
        node.outputs[0].replace_all_uses_with(value)
        graph.remove(node, safe=True)
    del graph.initializers[str(weight.name)]


def _multiply_transposed(graph: ir.Graph, node: ir.Node) -> None:
    for user, index in list(node.outputs[0].uses()):
        if user.op_type != "MatMul" or index != 1:
            raise TraceError(f"the tied weight {node.inputs[0].name} is read by {user.op_type}, not by MatMul")  # type: ignore[union-attr]
        fused = ir.node(
            "FusedMatMul",
            [user.inputs[0], node.inputs[0]],
            attributes={"transB": 1},
            domain="com.microsoft",
            version=1,
            num_outputs=1,
        )
        output, replaced = fused.outputs[0], user.outputs[0]
        output.shape, output.type = replaced.shape, replaced.type
        graph.insert_before(user, fused)
        name = replaced.name
        replaced.replace_all_uses_with(output, replace_graph_outputs=True)
        graph.remove(user, safe=True)
        output.name = name
    graph.remove(node, safe=True)
