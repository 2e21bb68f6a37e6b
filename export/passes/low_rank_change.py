"""The adapter's low-rank change of a product: where it is, and why an operator cannot absorb it.

Add(product, MatMul(Mul(MatMul(x, A), rows), B)), where a Split may have cut the columns of one A out of several.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from . import weights
from .graph import drop_unused, new_constant, only_user
from .rewrite import Declined

_APART = "its low-rank change stays apart: "
READ_TWICE = Declined(_APART + "the product is read by something else too")
RESHAPED = Declined(_APART + "the product is reshaped first")
CHANGE_READ_TWICE = Declined(_APART + "the change is read by something else too")
OTHER_INPUT = Declined(_APART + "it has another input")
OTHER_FORM = Declined(_APART + "its first product is not a constant's, times the rows' factors")
COLUMNS_READ = Declined(_APART + "the first product is also a part of a change that stays apart")


@dataclass(frozen=True)
class Change:
    """add: the sum with the product. split: what cuts the low values out of those of several changes. columns: of a
    that are this change's."""

    add: ir.Node
    split: ir.Node | None
    rows: ir.Value
    a: ir.Value
    b: ir.Value
    columns: tuple[int, int]


def change_of(node: ir.Node) -> Change | Declined | None:
    """The low-rank change of a product; None where there is none."""
    product = node.outputs[0]
    add = only_user(product)
    if add is None:
        return READ_TWICE if any(_second(user, product) is not None for user, _ in product.uses()) else None
    if add.op_type == "Reshape":
        reshaped = add.outputs[0]
        return RESHAPED if any(_second(user, reshaped) is not None for user, _ in reshaped.uses()) else None
    second = _second(add, product)
    if second is None:
        return None
    if only_user(second.outputs[0]) is None:
        return CHANGE_READ_TWICE
    low, b = second.inputs
    assert low is not None
    assert b is not None
    low, split, columns = _before_split(low)
    masked = low.producer()
    if masked is None or masked.op_type != "Mul":
        return OTHER_FORM
    for place in (0, 1):
        first, rows = masked.inputs[place], masked.inputs[1 - place]
        made = None if first is None else first.producer()
        if made is None or made.op_type != "MatMul":
            continue
        a = made.inputs[1]
        stored = None if a is None else stored_matrix(a)
        if rows is None or a is None or stored is None or not _of_rows(rows):
            continue
        if made.inputs[0] is not node.inputs[0]:
            return OTHER_INPUT
        return Change(add, split, rows, a, b, columns or (0, weights.matrix(stored).shape[1]))
    return OTHER_FORM


def stored_matrix(value: ir.Value) -> ir.Value | None:
    """The constant matrix behind a value: itself, or what is cast to it."""
    producer = value.producer()
    stored = producer.inputs[0] if producer is not None and producer.op_type == "Cast" else value
    return stored if weights.constant_matrix(stored) else None


def cut_columns(graph: ir.Graph, a: ir.Value, columns: tuple[int, int]) -> ir.Value:
    """A constant of those columns, or the whole one."""
    values = weights.matrix(a)
    if columns == (0, values.shape[1]):
        return a
    start, end = columns
    value = new_constant(graph, f"{a.name}.{start}", np.ascontiguousarray(values[:, start:end]))
    weights.note_parts(value, weights.parts(a))
    return value


def remove_change(graph: ir.Graph, node: ir.Node) -> None:
    """Remove a node that nothing reads, and what only it read, down to the product itself."""
    if any(output.uses() for output in node.outputs) or node.op_type == "MatMulNBits":
        return
    before = [value for value in node.inputs if value is not None]
    graph.remove(node, safe=True)
    for value in before:
        producer = value.producer()
        if producer is not None and producer.op_type in ("MatMul", "Mul", "Split", "Cast"):
            if producer.graph is not None:
                remove_change(graph, producer)
        elif value.is_initializer():
            drop_unused(graph, [value])


def _second(add: ir.Node, product: ir.Value) -> ir.Node | None:
    """The second product of the change that a node adds to a product."""
    if add.op_type != "Add":
        return None
    other = next((value for value in add.inputs if value is not product), None)
    node = None if other is None else other.producer()
    if node is None or node.op_type != "MatMul" or node.inputs[1] is None:
        return None
    stored = stored_matrix(node.inputs[1])
    return node if stored is not None and weights.is_adapter(stored) else None


def _before_split(low: ir.Value) -> tuple[ir.Value, ir.Node | None, tuple[int, int] | None]:
    """What a value was split from, the Split, and which columns the value is; just the value without a Split."""
    split = low.producer()
    if split is None or split.op_type != "Split":
        return low, None, None
    packed, sizes = split.inputs
    assert packed is not None
    assert sizes is not None
    ends = np.cumsum(weights.matrix(sizes))
    index = list(split.outputs).index(low)
    return packed, split, (int(ends[index - 1]) if index else 0, int(ends[index]))


def _of_rows(value: ir.Value) -> bool:
    """Whether a factor depends on the row: it is computed, where an adapter's own factors are constants."""
    return not value.is_initializer() and stored_matrix(value) is None
