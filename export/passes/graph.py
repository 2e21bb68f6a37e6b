"""Reading and editing the graph: who reads a value, new nodes and constants, one value in the place of another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from ..operands import trimmed
from .weights import Array


def nodes_of(model: ir.Model, *op_types: str) -> Iterator[ir.Node]:
    """The nodes of these kinds, in the graph's order, without those removed on the way."""
    for node in list(model.graph):
        if node.graph is model.graph and node.op_type in op_types:
            yield node


def operand(node: ir.Node, place: int) -> ir.Value | None:
    """An input by its place; None where the node leaves it out."""
    return node.inputs[place] if place < len(node.inputs) else None


def only_user(value: ir.Value, op_type: str = "") -> ir.Node | None:
    """The node of that kind that reads a value, if nothing else does."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    user = uses[0][0]
    return user if op_type in ("", user.op_type) else None


def new_weight(
    graph: ir.Graph, name: str, make: Callable[[], Array], shape: Sequence[int], dtype: ir.DataType
) -> ir.Value:
    """A new initializer, whose values are made when the file is written. The name gets a number if it is taken: layers
    may share what it is made of."""
    name = _free_name(graph, name)

    def made() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(make()), name=name)

    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    value.const_value = ir.LazyTensor(made, dtype=dtype, shape=value.shape, name=name)  # type: ignore[arg-type]
    graph.register_initializer(value)
    return value


def new_constant(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    """A new initializer with existing values. The name gets a number if it is taken."""
    name = _free_name(graph, name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.from_numpy(array.dtype)))
    value.const_value = ir.tensor(array, name=name)
    graph.register_initializer(value)
    return value


def _free_name(graph: ir.Graph, name: str) -> str:
    names = (name, *(f"{name}.{number}" for number in range(1, len(graph.initializers) + 1)))
    return next(each for each in names if each not in graph.initializers)


def add_node(
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    outputs: int = 1,
    domain: str = "",
    **attributes: Any,
) -> ir.Node:
    """A new node in front of another one. Inputs at the end that are None are left out."""
    node = ir.node(op_type, trimmed(inputs), attributes=attributes, domain=domain, num_outputs=outputs)
    assert before.graph is not None
    before.graph.insert_before(before, node)
    return node


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """`new` takes the place of `old` everywhere, including its name as an output of the graph."""
    new.type, new.shape = old.type, old.shape
    name = old.name
    output = old.is_graph_output()
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    if output:
        old.name = f"{name}.replaced"
        new.name = name


def drop_unused(graph: ir.Graph, values: Sequence[ir.Value]) -> None:
    """Remove initializers that nothing reads any more."""
    for value in values:
        if not value.uses() and str(value.name) in graph.initializers:
            del graph.initializers[str(value.name)]
