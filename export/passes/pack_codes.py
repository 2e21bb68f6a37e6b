"""Codes in bytes that fit 5 or 6 bits, as four bits of each and what is left of them.

A graph with such weights has them in bytes until it is verified, because onnxruntime's operators have no such widths.
The project's own operators read them as the file then has them; the functions of products rebuild the bytes, which
onnxruntime does once, when it loads the graph. The functions are overloads, one for each width with and without zero
points; what they compute is in functions of names of their own, because others call those.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from ..quantization.weight_format import TOGETHER, split
from . import functions, weights
from .graph import add_node, drop_unused, new_constant, nodes_of, operand, replace_value
from .low_rank_change import stored_matrix
from .quantized_matmul import ATTRIBUTES, BLOCK_SIZES, INPUTS, LOW_RANK, PLAIN, body
from .rewrite import Declined, JointRewrite, Outcome

GATHER = "QuantizedGather"
MORE = {PLAIN: 5, LOW_RANK: 8}
"""The place of the input `more` of products."""
SMALL_BLOCKS = Declined(f"its blocks are none of {', '.join(map(str, BLOCK_SIZES))}")
READ_OTHERWISE = Declined("something else reads its codes too")
_CODES = "QuantizedCodes"
_SCALES, _ZERO_POINTS = 2, 3  # inputs of a product
_GATHER_INPUTS = "ids, weights, more, scales, zero_points"


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

    @property
    def overload(self) -> str:
        return f"bits{self.bits}" + ("" if self.zero_points is None else "_zero_points")


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
    fused.overload = packed.overload
    replace_value(node.outputs[0], fused.outputs[0])
    graph.remove(node, safe=True)
    for value in made:
        producer = value.producer()
        if producer is not None and not value.uses():
            read = [each for each in producer.inputs if each is not None]
            graph.remove(producer, safe=True)
            drop_unused(graph, read)
    _define(model, name, packed)


def _define(model: ir.Model, name: str, packed: _Packed) -> None:
    bits, given = packed.bits, packed.zero_points is not None
    codes = f"{_CODES}_bits{bits}"
    functions.define(model, codes, (), "weights, more", "codes", _codes_body(bits))
    if name == GATHER:
        text = _gather_body(codes, bits, given)
        functions.define(model, GATHER, ("bits", "block_size"), _GATHER_INPUTS, "y", text, packed.overload)
        return
    points = "zero_points" if given else "middle"
    text = f"codes = {functions.DOMAIN}.{codes} (weights, more) {body(name, 'codes', '8', points)}"
    if not given:
        middle = f"uint8[1] {{{1 << bits - 1}}}"
        text = f"shape = Shape (scales) middle = ConstantOfShape <value: tensor = {middle}> (shape) {text}"
    inputs = f"{INPUTS[name]}, more"
    functions.define(model, computing(name, packed.overload), ATTRIBUTES, inputs, "y", text)
    given_attributes = ", ".join(f"{attribute}: int = @{attribute}" for attribute in ATTRIBUTES)
    call = f"y = {functions.DOMAIN}.{computing(name, packed.overload)} <{given_attributes}> ({inputs})"
    functions.define(model, name, ATTRIBUTES, inputs, "y", call, packed.overload)


def computing(name: str, overload: str) -> str:
    """The function that computes what an overload of a product does."""
    return f"{name}_{overload}"


def _codes_body(bits: int) -> str:
    """What `split` does undone: weights (M, blocks, block_size / 2) and more (M, groups, 4 * extra) become codes
    (M, blocks, block_size)."""
    extra, half = bits - 4, TOGETHER // 2
    lines = [
        _constant("places", "int64", 0, -1, 1, half),
        _constant("parities", "uint8", 0, 4, shape="2,1"),
        _constant("fifteen", "uint8", 15),
        _constant("extra", "uint8", extra),
        "halves = Reshape (weights, places)",
        'pairs = BitShift <direction: string = "RIGHT"> (halves, parities)',
        "four = BitwiseAnd (pairs, fifteen)",
        'sum = BitShift <direction: string = "LEFT"> (four, extra)',
        _constant("byte_places", "int64", 0, 0, extra, 4, 1),
        _constant("bit_numbers", "uint8", *range(8)),
        _constant("one", "uint8", 1),
        _constant("bit_places", "int64", 0, 0, extra, 2, half),
        "bytes = Reshape (more, byte_places)",
        'shifted = BitShift <direction: string = "RIGHT"> (bytes, bit_numbers)',
        "bits = BitwiseAnd (shifted, one)",
        "planes = Reshape (bits, bit_places)",
    ]
    total = "sum"
    for plane in range(extra):
        lines += [
            f"number{plane} = Constant <value_int: int = {plane}> ()",
            f"plane{plane} = Gather <axis: int = 2> (planes, number{plane})",
            _constant(f"place{plane}", "uint8", plane),
            f'moved{plane} = BitShift <direction: string = "LEFT"> (plane{plane}, place{plane})',
            f"sum{plane} = BitwiseOr ({total}, moved{plane})",
        ]
        total = f"sum{plane}"
    lines += [
        f"apart = Transpose <perm: ints = [0, 1, 3, 2]> ({total})",
        "blocks = Shape <end: int = 2> (weights)",
        _constant("rest", "int64", -1),
        "target = Concat <axis: int = 0> (blocks, rest)",
        "codes = Reshape (apart, target)",
    ]
    return "\n".join(lines)


def _gather_body(codes: str, bits: int, zero_points: bool) -> str:
    """(code - zero point) * scale of the rows `ids`."""
    points = (
        "point_rows = Gather (zero_points, flat) points = Cast <to: int = 1> (point_rows)"
        if zero_points
        else f"{_constant('middle', 'float', 1 << bits - 1)} shape = Shape (wide) points = Expand (middle, shape)"
    )
    return f"""
        {_constant("rest", "int64", -1)}
        flat = Reshape (ids, rest)
        rows = Gather (weights, flat)
        more_rows = Gather (more, flat)
        codes = {functions.DOMAIN}.{codes} (rows, more_rows)
        numbers = Cast <to: int = 1> (codes)
        scale_rows = Gather (scales, flat)
        wide = Cast <to: int = 1> (scale_rows)
        {points}
        block_points = Unsqueeze (points, rest)
        block_scales = Unsqueeze (wide, rest)
        steps = Sub (numbers, block_points)
        values = Mul (steps, block_scales)
        batch = Shape (ids)
        target = Concat <axis: int = 0> (batch, rest)
        y = Reshape (values, target)
    """


def _constant(name: str, dtype: str, *values: int, shape: str = "") -> str:
    numbers = ", ".join(map(str, values))
    return f"{name} = Constant <value: tensor = {dtype}[{shape or len(values)}] {{{numbers}}}> ()"


pack_codes = JointRewrite(
    "pack_codes",
    "imsm.QuantizedMatMul and GatherBlockQuantized with codes of 5 or 6 bits in bytes -> imsm.QuantizedMatMul, "
    "imsm.QuantizedGather with four bits of each and what is left of them",
    _candidates,
    _check,
    _rewrite,
)
