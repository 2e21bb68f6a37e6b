"""Codes in bytes that fit 5 or 6 bits, as four bits of each and what is left of them.

A graph with such weights has them in bytes until it is verified, because onnxruntime's operators have no such widths.
The project's own operators read them as the file then has them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from ..quantization.weight_format import split
from . import functions, weights
from .graph import add_node, drop_unused, new_constant, nodes_of, operand, replace_value
from .low_bits import GATHER, MORE, define_low_bits, overload
from .low_rank_change import stored_matrix
from .quantized_matmul import ATTRIBUTES, BLOCK_SIZES, LOW_RANK, PLAIN
from .rewrite import Declined, JointRewrite, Outcome

SMALL_BLOCKS = Declined(f"its blocks are none of {', '.join(map(str, BLOCK_SIZES))}")
READ_OTHERWISE = Declined("something else reads its codes too")
_SCALES, _ZERO_POINTS = 2, 3  # inputs of a product


@dataclass(frozen=True)
class _Reader:
    """A node that reads codes in bytes. codes, zero_points: the constants, (N, blocks, block_size) and (N, blocks)."""

    node: ir.Node
    codes: ir.Value
    zero_points: ir.Value


@dataclass(frozen=True)
class _Packed:
    """What is stored in the place of codes. zero_points: None where all are in the middle."""

    weights: ir.Value
    more: ir.Value
    zero_points: ir.Value | None
    bits: int


def _candidates(model: ir.Model) -> Iterator[_Reader]:
    """Products and lookups with codes that fit."""
    for node in nodes_of(model, PLAIN, LOW_RANK, "GatherBlockQuantized"):
        points = operand(node, _ZERO_POINTS)
        if node.attributes.get_int("bits", 0) != 8 or points is None or points.const_value is None:
            continue
        codes = _codes(node)
        if codes is not None and _width(codes, points) < 8:
            yield _Reader(node, codes, points)


def _codes(node: ir.Node) -> ir.Value | None:
    """The constant; a lookup reads rows of it, which a Reshape makes."""
    value = node.inputs[0 if node.op_type == "GatherBlockQuantized" else 1]
    producer = None if value is None else value.producer()
    if producer is not None and producer.op_type == "Reshape":
        value = producer.inputs[0]
    constant = None if value is None else value.const_value
    return value if constant is not None and len(constant.shape) == 3 else None


def _width(codes: ir.Value, points: ir.Value) -> int:
    """Bits that hold all codes and zero points: 5, 6 or 8."""
    largest = max(int(weights.matrix(value).max()) for value in (codes, points))
    return next((bits for bits in (5, 6) if largest < 1 << bits), 8)


def _check(found: _Reader) -> _Reader | Declined:
    if found.node.attributes.get_int("block_size", 0) not in BLOCK_SIZES:
        return SMALL_BLOCKS
    return found


def _rewrite(model: ir.Model, found: Sequence[_Reader]) -> Outcome:
    """Counts nodes."""
    readers: dict[tuple[ir.Value, ir.Value], list[_Reader]] = defaultdict(list)
    for reader in found:
        readers[reader.codes, reader.zero_points].append(reader)
    outcome = Outcome()
    for (codes, points), group in readers.items():
        nodes = {reader.node for reader in group}
        if not all(user in nodes or _only_for(user, nodes) for user, _ in codes.uses()):
            for _ in group:
                outcome.decline(READ_OTHERWISE)
            continue
        packed = _packed(model.graph, codes, points)
        for reader in group:
            _replace(model, reader, packed)
        drop_unused(model.graph, [codes, points])
        outcome.fired += len(group)
    return outcome


def _only_for(user: ir.Node, nodes: set[ir.Node]) -> bool:
    return user.op_type == "Reshape" and all(node in nodes for node in user.successors())


def _packed(graph: ir.Graph, codes: ir.Value, points: ir.Value) -> _Packed:
    bits = _width(codes, points)
    high, low = split(weights.matrix(codes), bits)
    assert low is not None
    name = str(codes.name).removesuffix(".int8")
    middle = bool((weights.matrix(points) == 1 << bits - 1).all())
    return _Packed(
        new_constant(graph, f"{name}.int{bits}", high),
        new_constant(graph, f"{name}.int{bits}.more", low),
        None if middle else points,
        bits,
    )


def _replace(model: ir.Model, reader: _Reader, packed: _Packed) -> None:
    """Put the operator in the node's place."""
    node, graph = reader.node, model.graph
    name = GATHER if node.op_type == "GatherBlockQuantized" else node.op_type
    bits, block_size = packed.bits, node.attributes.get_int("block_size")
    made: list[ir.Value] = []  # what a lookup reads that nodes make of constants
    if name == GATHER:
        made = [value for value in node.inputs if value is not None and value.producer() is not None]
        scales = node.inputs[_SCALES]
        assert scales is not None
        operands = [
            node.inputs[1],
            packed.weights,
            packed.more,
            stored_matrix(scales) or scales,
            packed.zero_points,
        ]
        attributes = {"bits": bits, "block_size": block_size}
    else:
        operands = list(node.inputs) + [None] * (MORE[node.op_type] - len(node.inputs)) + [packed.more]
        operands[1], operands[_ZERO_POINTS] = packed.weights, packed.zero_points
        attributes = {name: node.attributes.get_int(name) for name in ATTRIBUTES} | {"bits": bits}
    fused = add_node(node, name, operands, domain=functions.DOMAIN, **attributes)
    fused.overload = overload(bits, packed.zero_points is not None)
    replace_value(node.outputs[0], fused.outputs[0])
    graph.remove(node, safe=True)
    for value in made:
        producer = value.producer()
        if producer is not None and not value.uses():
            read = [each for each in producer.inputs if each is not None]
            graph.remove(producer, safe=True)
            drop_unused(graph, read)
    define_low_bits(model, name, bits, packed.zero_points is not None)


pack_codes = JointRewrite(
    "pack_codes",
    "imsm.QuantizedMatMul and GatherBlockQuantized with codes of 5 or 6 bits in bytes -> imsm.QuantizedMatMul, "
    "imsm.QuantizedGather with four bits of each and what is left of them",
    _candidates,
    _check,
    _rewrite,
)
