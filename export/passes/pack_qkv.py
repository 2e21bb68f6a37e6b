"""Queries, keys and values from one product, which GroupQueryAttention takes packed.

In half precision, for GPUs, where every node is a launch, both streams' attention takes its half of one product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from .graph import add_node, nodes_of, only_user
from .projections import HALVES, Projection, join, join_problem, projection, remove
from .rewrite import Declined, Rewrite

_QKV = slice(0, 3)


@dataclass(frozen=True)
class _Attention:
    """nodes: of all streams, if `splits` give each its rows of queries, keys and values."""

    nodes: list[ir.Node]
    projections: list[Projection]
    splits: list[ir.Node]


def _candidates(model: ir.Model) -> Iterator[ir.Node]:
    for node in nodes_of(model, "GroupQueryAttention"):
        if all(value is not None for value in node.inputs[_QKV]):
            yield node


def _check(node: ir.Node) -> _Attention | Declined:
    """One input for all, and changes that come from one Split in the same order, or none at all."""
    nodes, values, splits = [node], node.inputs[_QKV], _by_stream(node)
    if splits:
        nodes = [user for output in splits[0].outputs for user, _ in output.uses()]
        values = [split.inputs[0] for split in splits]
    projections = []
    for value in values:
        assert value is not None
        found = projection(value, "attention")
        if isinstance(found, Declined):
            return found
        projections.append(found)
    problem = join_problem(projections)
    if problem is not None:
        return problem
    return _Attention(nodes, projections, splits)


def _by_stream(node: ir.Node) -> list[ir.Node]:
    """The Splits that give the attention of every stream its rows of half-precision queries, keys and values, and
    nothing else; empty if there are none."""
    splits: list[ir.Node] = []
    readers: list[list[ir.Node | None]] = []
    for value in node.inputs[_QKV]:
        split = None if value is None else value.producer()
        if split is None or split.op_type != "Split" or split.attributes.get_int("axis", 0) != 0:
            return []
        splits.append(split)
        readers.append([only_user(output, node.op_type) for output in split.outputs])
    alike = readers[0] == readers[1] == readers[2]  # each takes the same rows of all three
    half = all(output.dtype in HALVES for output in splits[0].outputs)
    return splits if alike and half and None not in readers[0] else []


def _rewrite(model: ir.Model, found: _Attention) -> None:
    graph, attention = model.graph, found.nodes[0]
    result = join(graph, attention, found.projections, "qkv")
    packs = [result]
    if found.splits:
        streams = len(found.nodes)
        packs = list(add_node(attention, "Split", [result], outputs=streams, axis=0, num_outputs=streams).outputs)
    for node, pack in zip(found.nodes, packs, strict=True):
        for place, value in enumerate((pack, None, None)):
            node.replace_input_with(place, value)
    for node in found.splits:
        graph.remove(node, safe=True)
    remove(graph, found.projections)


pack_qkv = Rewrite(
    "pack_qkv",
    "q, k, v, each MatMul(x, W) [+ bias] [+ MatMul(low, B)] -> "
    "one MatMul(x, [Wq Wk Wv]) [+ bias] [+ MatMul(lows, blocks)]",
    _candidates,
    _check,
    _rewrite,
)
