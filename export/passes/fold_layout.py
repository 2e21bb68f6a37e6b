"""Weights that the graph only lays out anew, such as the interleaved rows of experts, laid out in the file.

Reshape(weight, constant), Transpose(weight of 3 or more dimensions) -> weight

onnxruntime would copy gigabytes at every start or step; constant folding copies them here, and stops at a size. The
copy is made while the file is written, one weight at a time. Matrices are `lay_out_weights`' business.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from . import weights

Layout = Callable[[NDArray[np.generic]], NDArray[np.generic]]


def fold_layout(model: ir.Model) -> int:
    """Returns how many nodes went. A weight that something else reads too stays, so that it is stored once."""
    count = 0
    for node in list(model.graph):
        weight = node.inputs[0] if node.inputs else None
        layout = _layout(node)
        if weight is None or layout is None or not weight.is_initializer() or len(weight.uses()) > 1:
            continue
        _fold(model.graph, node, weight, layout)
        count += 1
    return count


def _layout(node: ir.Node) -> Layout | None:
    """What the node does to a weight; None: something else, or nothing that is known before it runs."""
    weight = node.inputs[0] if node.inputs else None
    if weight is None or weight.const_value is None or node.domain != "":
        return None
    if node.op_type == "Transpose" and len(weight.const_value.shape) > 2:
        axes = node.attributes.get_ints("perm")
        return None if axes is None else lambda array: array.transpose(axes)
    if node.op_type == "Reshape" and node.inputs[1] is not None and node.inputs[1].const_value is not None:
        sizes = [int(size) for size in node.inputs[1].const_value.numpy()]
        return None if 0 in sizes else lambda array: array.reshape(sizes)
    return None


def _fold(graph: ir.Graph, node: ir.Node, weight: ir.Value, layout: Layout) -> None:
    original, name = weight.const_value, f"{weight.name}.laid_out"
    assert original is not None
    # A view of no memory has the shape that the result will have.
    shape = ir.Shape(layout(np.broadcast_to(np.zeros((), np.int8), original.shape.numpy())).shape)

    def laid_out() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(layout(original.numpy())), name=name)

    value = ir.Value(name=name, shape=shape, type=ir.TensorType(original.dtype))
    value.const_value = ir.LazyTensor(laid_out, dtype=original.dtype, shape=shape, name=name)
    weights.note_parts(value, weights.parts(weight))
    graph.register_initializer(value)
    node.outputs[0].replace_all_uses_with(value)
    graph.remove(node, safe=True)
    del graph.initializers[str(weight.name)]
