"""Queries, keys and values from one product, which GroupQueryAttention takes packed.

q, k, v, each MatMul(x, W) [+ bias] [+ MatMul(low, B)] -> one MatMul(x, [Wq Wk Wv]) [+ bias] [+ MatMul(lows, blocks)]

`lows` is what `pack_low_rank` made before it split it; the Bs become the blocks of one matrix, zero elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from . import weights

_QKV = slice(0, 3)


@dataclass
class Projection:
    """The terms of one output: a product with the backbone's weight, a bias, and a low-rank change's second product."""

    x: ir.Value | None = None
    weight: ir.Value | None = None
    bias: ir.Value | None = None
    low: ir.Value | None = None
    factor: ir.Value | None = None
    nodes: list[ir.Node] = field(default_factory=list)

    @property
    def width(self) -> int:
        """Output features."""
        assert self.weight is not None
        return int(weights.matrix(self.weight).shape[1])


def pack_qkv(model: ir.Model) -> int:
    """Returns how many attention nodes got one packed input."""
    count = 0
    for node in list(model.graph):
        if node.op_type != "GroupQueryAttention" or any(value is None for value in node.inputs[_QKV]):
            continue
        found = [_projection(value) for value in node.inputs[_QKV] if value is not None]
        projections = [projection for projection in found if projection is not None]
        if len(projections) == 3 and _fit(projections):
            _pack(model.graph, node, projections)
            count += 1
    return count


def _projection(value: ir.Value) -> Projection | None:
    """The terms of a value that nothing else reads; None if it is anything else than a projection."""
    found = Projection()
    pending = [value]
    while pending:
        term = pending.pop()
        node = term.producer()
        if _is_bias(term) and found.bias is None:
            found.bias = term
        elif node is None or len(list(term.uses())) != 1 or term.is_graph_output():
            return None
        elif node.op_type == "Add":
            found.nodes.append(node)
            pending += [part for part in node.inputs if part is not None]
        elif node.op_type == "MatMul" and weights.constant_matrix(node.inputs[1]) and node.inputs[1] is not None:
            found.nodes.append(node)
            if not weights.is_adapter(node.inputs[1]) and found.weight is None:
                found.x, found.weight = node.inputs
            elif weights.is_adapter(node.inputs[1]) and found.factor is None:
                found.low, found.factor = node.inputs
            else:
                return None
        else:
            return None
    return found if found.weight is not None else None


def _is_bias(value: ir.Value) -> bool:
    """Whether the value is a constant vector of the backbone."""
    return (
        value.is_initializer()
        and value.const_value is not None
        and len(value.const_value.shape) == 1
        and weights.is_backbone(value)
    )


def _fit(projections: list[Projection]) -> bool:
    """One input for all, and changes that come from one Split in the same order, or none at all."""
    if len({id(projection.x) for projection in projections}) > 1:
        return False
    lows = [projection.low for projection in projections if projection.low is not None]
    if len(lows) < 2:
        return not lows
    split = lows[0].producer()
    return split is not None and split.op_type == "Split" and list(split.outputs) == lows


def _pack(graph: ir.Graph, attention: ir.Node, projections: list[Projection]) -> None:
    first = projections[0]
    assert first.weight is not None
    assert first.weight.dtype is not None
    dtype = first.weight.dtype
    known = [projection.weight for projection in projections if projection.weight is not None]
    widths = [projection.width for projection in projections]
    inputs = weights.matrix(first.weight).shape[0]
    packed = weights.new_weight(
        graph,
        f"{first.weight.name}.qkv",
        lambda: np.concatenate([weights.matrix(weight) for weight in known], axis=1),
        (inputs, sum(widths)),
        dtype,
    )
    weights.note_parts(packed, [name for weight in known for name in weights.parts(weight)], widths)
    result = weights.add_node(attention, "MatMul", [first.x, packed]).outputs[0]
    biases = [projection.bias for projection in projections]
    if any(bias is not None for bias in biases):
        bias = weights.new_weight(
            graph,
            f"{packed.name}.bias",
            lambda: np.concatenate(
                [
                    np.zeros(width, dtype.numpy()) if bias is None else weights.matrix(bias)
                    for bias, width in zip(biases, widths, strict=True)
                ]
            ),
            (sum(widths),),
            dtype,
        )
        result = weights.add_node(attention, "Add", [result, bias]).outputs[0]
    lows = [projection.low for projection in projections if projection.low is not None]
    if lows:
        split = lows[0].producer()
        assert split is not None
        blocks = _blocks(graph, f"{packed.name}.adapter_b", projections, dtype)
        change = weights.add_node(attention, "MatMul", [split.inputs[0], blocks]).outputs[0]
        result = weights.add_node(attention, "Add", [result, change]).outputs[0]
    attention.replace_input_with(0, result)
    attention.replace_input_with(1, None)
    attention.replace_input_with(2, None)
    for projection in projections:
        for node in projection.nodes:
            graph.remove(node, safe=True)
    if lows and split is not None:
        graph.remove(split, safe=True)
    gone = [value for p in projections for value in (p.weight, p.bias, p.factor) if value is not None]
    weights.drop_unused(graph, gone)


def _blocks(graph: ir.Graph, name: str, projections: list[Projection], dtype: ir.DataType) -> ir.Value:
    """(ranks of all, widths of all): each B at its own rows and columns."""
    factors = [None if p.factor is None else weights.matrix(p.factor) for p in projections]
    widths = [projection.width for projection in projections]
    ranks = sum(0 if factor is None else factor.shape[0] for factor in factors)

    def make() -> weights.Array:
        blocks = np.zeros((ranks, sum(widths)), dtype.numpy())
        row = column = 0
        for factor, width in zip(factors, widths, strict=True):
            if factor is not None:
                blocks[row : row + len(factor), column : column + width] = factor
                row += len(factor)
            column += width
        return blocks

    value = weights.new_weight(graph, name, make, (ranks, sum(widths)), dtype)
    weights.note_parts(value, [part for p in projections if p.factor is not None for part in weights.parts(p.factor)])
    return value
