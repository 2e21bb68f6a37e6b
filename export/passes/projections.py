"""Products of one input with the backbone's weights, each with a bias and a low-rank change, as one product.

Where changes are `low`s that `pack_low_rank` split, the Bs become the blocks of one matrix, zero elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from . import weights
from .graph import add_node, drop_unused, new_weight, only_user
from .rewrite import Declined

HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
READ_TWICE = Declined("a projection is read by something else too")
OTHER_TERM = Declined("a projection is more than a product, a bias and a low-rank change")
OTHER_INPUT = Declined("the projections are made of different inputs")
OTHER_LOWS = Declined("the low-rank changes are not the parts of one product, in the order of the projections")


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


def projection(value: ir.Value, name: str = "what reads it") -> Projection | Declined:
    """The terms of a value that nothing else reads."""
    found = Projection()
    pending = [value]
    while pending:
        term = pending.pop()
        node = term.producer()
        if _is_bias(term) and found.bias is None:
            found.bias = term
            continue
        if node is None:
            return OTHER_TERM
        if only_user(term) is None:
            return READ_TWICE
        found.nodes.append(node)
        if node.op_type == "Add":
            pending += [part for part in node.inputs if part is not None]
        elif node.op_type != "MatMul":
            return Declined(f"{node.op_type} stands between a projection and {name}")
        elif not _take_product(found, node):
            return OTHER_TERM
    return found if found.weight is not None else OTHER_TERM


def _take_product(found: Projection, node: ir.Node) -> bool:
    """Note a product with a constant as the backbone's or the adapter's; False if there is one already."""
    factor = node.inputs[1]
    if factor is None or not weights.constant_matrix(factor):
        return False
    if weights.is_adapter(factor):
        fits = found.factor is None
        found.low, found.factor = node.inputs
    else:
        fits = found.weight is None
        found.x, found.weight = node.inputs
    return fits


def _is_bias(value: ir.Value) -> bool:
    """Whether the value is a constant vector of the backbone."""
    return (
        value.is_initializer()
        and value.const_value is not None
        and len(value.const_value.shape) == 1
        and weights.is_backbone(value)
    )


def join_problem(projections: Sequence[Projection]) -> Declined | None:
    """Why projections cannot be one product: other inputs, or changes that do not come from one Split in the same
    order."""
    if len({projection.x for projection in projections}) > 1:
        return OTHER_INPUT
    lows = [projection.low for projection in projections if projection.low is not None]
    split = lows[0].producer() if lows else None
    if lows and (len(lows) == 1 or split is None or split.op_type != "Split" or list(split.outputs) != lows):
        return OTHER_LOWS
    return None


def join(graph: ir.Graph, before: ir.Node, projections: Sequence[Projection], suffix: str) -> ir.Value:
    """The outputs of projections beside each other, (..., all widths), by nodes in front of one. suffix: of the joint
    weight's name."""
    known = [projection.weight for projection in projections if projection.weight is not None]
    widths = [projection.width for projection in projections]
    assert known[0].dtype is not None
    dtype = known[0].dtype
    packed = new_weight(
        graph,
        f"{known[0].name}.{suffix}",
        lambda: np.concatenate([weights.matrix(weight) for weight in known], axis=1),
        (weights.matrix(known[0]).shape[0], sum(widths)),
        dtype,
    )
    weights.note_parts(packed, [name for weight in known for name in weights.parts(weight)], widths)
    result = add_node(before, "MatMul", [projections[0].x, packed]).outputs[0]
    if any(projection.bias is not None for projection in projections):
        bias = _bias(graph, f"{packed.name}.bias", projections, dtype)
        result = add_node(before, "Add", [result, bias]).outputs[0]
    split = next((p.low.producer() for p in projections if p.low is not None), None)
    if split is not None:
        blocks = _blocks(graph, f"{packed.name}.adapter_b", projections, dtype)
        change = add_node(before, "MatMul", [split.inputs[0], blocks]).outputs[0]
        result = add_node(before, "Add", [result, change]).outputs[0]
    return result


def remove(graph: ir.Graph, projections: Sequence[Projection]) -> None:
    """Take the nodes and weights of projections out, whose outputs nothing reads any more."""
    split = next((p.low.producer() for p in projections if p.low is not None), None)
    for each in projections:
        for node in each.nodes:
            graph.remove(node, safe=True)
    if split is not None:
        graph.remove(split, safe=True)
    drop_unused(graph, [value for p in projections for value in (p.weight, p.bias, p.factor) if value is not None])


def _bias(graph: ir.Graph, name: str, projections: Sequence[Projection], dtype: ir.DataType) -> ir.Value:
    """(widths of all): each bias, zeros where there is none."""
    parts = [(projection.bias, projection.width) for projection in projections]

    def make() -> weights.Array:
        return np.concatenate(
            [np.zeros(width, dtype.numpy()) if bias is None else weights.matrix(bias) for bias, width in parts]
        )

    return new_weight(graph, name, make, (sum(width for _, width in parts),), dtype)


def _blocks(graph: ir.Graph, name: str, projections: Sequence[Projection], dtype: ir.DataType) -> ir.Value:
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

    value = new_weight(graph, name, make, (ranks, sum(widths)), dtype)
    weights.note_parts(value, [part for p in projections if p.factor is not None for part in weights.parts(p.factor)])
    return value
