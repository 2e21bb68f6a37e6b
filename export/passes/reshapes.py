"""Reshapes that only undo each other: heads split apart for attention and put together again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from .graph import nodes_of
from .rewrite import Declined, Rewrite

COPIES = Declined("its shape copies a dimension of the reshape before it")


@dataclass(frozen=True)
class _Reshape:
    """source: what it may read instead. needless: whether that has the resulting shape already."""

    node: ir.Node
    source: ir.Value
    needless: bool


def _candidates(model: ir.Model) -> Iterator[ir.Node]:
    """Reshapes of reshapes, and those that change nothing."""
    for node in nodes_of(model, "Reshape"):
        if _reshape_before(node) is not None or _needless(node, node.inputs[0]):
            yield node


def _check(node: ir.Node) -> _Reshape | Declined:
    before, source = _reshape_before(node), node.inputs[0]
    if before is not None and not _copies_a_dimension(node):
        source = before.inputs[0]
    needless = _needless(node, source)
    assert source is not None
    return _Reshape(node, source, needless) if needless or source is not node.inputs[0] else COPIES


def _rewrite(model: ir.Model, found: _Reshape) -> None:
    node, before = found.node, _reshape_before(found.node)
    if found.source is not node.inputs[0]:
        node.replace_input_with(0, found.source)
    if found.needless:
        node.outputs[0].replace_all_uses_with(found.source)
        model.graph.remove(node, safe=True)
    if before is not None and not any(output.uses() or output.is_graph_output() for output in before.outputs):
        model.graph.remove(before, safe=True)


def _reshape_before(node: ir.Node) -> ir.Node | None:
    producer = None if node.inputs[0] is None else node.inputs[0].producer()
    return producer if producer is not None and producer.op_type == "Reshape" else None


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


def _needless(node: ir.Node, source: ir.Value | None) -> bool:
    result = node.outputs[0]
    known = source is not None and source.shape is not None and result.shape is not None
    return known and source.shape == result.shape and not result.is_graph_output()  # type: ignore[union-attr]


merge_reshapes = Rewrite(
    "merge_reshapes",
    "Reshape(Reshape(x, a), b) -> Reshape(x, b), where b names every dimension; "
    "Reshape(x, a) -> x, where x already has that shape",
    _candidates,
    _check,
    _rewrite,
)
