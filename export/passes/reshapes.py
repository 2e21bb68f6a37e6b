"""Reshapes that only undo each other: heads split apart for attention and put together again.

Reshape(Reshape(x, a), b) -> Reshape(x, b)         where b names every dimension
Reshape(x, a)             -> x                     where x already has that shape
"""

from __future__ import annotations

import onnx_ir as ir


def merge_reshapes(model: ir.Model) -> int:
    """Remove them; returns how many Reshape nodes are gone or shortened."""
    count = 0
    for node in list(model.graph):
        if node.op_type != "Reshape" or node.domain != "":
            continue
        source = node.inputs[0]
        assert source is not None
        producer = source.producer()
        if producer is not None and producer.op_type == "Reshape" and not _copies_a_dimension(node):
            node.replace_input_with(0, producer.inputs[0])
            count += 1
        if _same_shape(node.inputs[0], node.outputs[0]) and not node.outputs[0].is_graph_output():
            node.outputs[0].replace_all_uses_with(node.inputs[0])  # type: ignore[arg-type]
            model.graph.remove(node, safe=True)
            count += 1
        if producer is not None and not any(output.uses() or output.is_graph_output() for output in producer.outputs):
            model.graph.remove(producer, safe=True)
    return count


def _copies_a_dimension(node: ir.Node) -> bool:
    """Whether the shape operand holds a 0, "the same as the input's", which means another input's after merging."""
    shape = node.inputs[1]
    assert shape is not None
    if shape.const_value is not None:
        return bool((shape.const_value.numpy() == 0).any())
    producer = shape.producer()
    if producer is None or producer.op_type != "Concat":
        return True
    parts = [part.const_value for part in producer.inputs if part is not None and part.const_value is not None]
    return any(bool((part.numpy() == 0).any()) for part in parts)


def _same_shape(one: ir.Value | None, other: ir.Value) -> bool:
    return one is not None and one.shape is not None and other.shape is not None and one.shape == other.shape
