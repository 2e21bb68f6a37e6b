"""Products with int4 or int8 weights as one operator of this project, with the adapter's low-rank change of them.

MatMulNBits(x, W) [+ MatMul(Mul(MatMul(x, A), rows), B)]  ->  imsm.QuantizedMatMul(x, W, ...), a function of the graph

The runtime has a kernel for it (`runtime/kernels`). Wherever that is not in use, onnxruntime runs the function's own
nodes, so that the file needs nothing but onnxruntime.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from . import functions, weights
from .half_adapter import in_half, store_in_half
from .quantize_experts import INT8_COMPUTE

BITS = (4, 8)
BLOCK_SIZES = (32, 64, 128)
ATTRIBUTES = ("K", "N", "bits", "block_size")
PLAIN, LOW_RANK = "QuantizedMatMul", "QuantizedMatMulLowRank"
_SCALES = "wide_scales = Cast <to: int = 1> (scales)"
_PRODUCT = """com.microsoft.MatMulNBits <K: int = @K, N: int = @N, bits: int = @bits, block_size: int = @block_size,
    accuracy_level: int = 4> (x, weights, wide_scales, zero_points, "", bias)"""
_FUNCTIONS = {
    PLAIN: ("(x, weights, scales, zero_points, bias)", f"{_SCALES} y = {_PRODUCT}"),
    LOW_RANK: (
        "(x, weights, scales, zero_points, bias, rows, a, b)",
        f"""
        {_SCALES}
        plain = {_PRODUCT}
        wide_a = Cast <to: int = 1> (a)
        wide_b = Cast <to: int = 1> (b)
        low = MatMul (x, wide_a)
        kept = Mul (low, rows)
        change = MatMul (kept, wide_b)
        y = Add (plain, change)
        """,
    ),
}


@dataclass(frozen=True)
class _Change:
    """Add(product, MatMul(low, b)), where low is the rows' part of MatMul(x, a), or columns of it."""

    add: ir.Node
    split: ir.Node | None
    rows: ir.Value
    a: ir.Value
    b: ir.Value
    columns: tuple[int, int]


def has_operator(bits: int, block_size: int) -> bool:
    """Whether products with weights in this form become the project's own operator."""
    return bits in BITS and block_size in BLOCK_SIZES


def fuse_quantized_matmul(model: ir.Model) -> int:
    """Returns how many products became the project's own operator."""
    graph = model.graph
    found = {node: _change(node) for node in list(graph) if _fits(node)}
    # Columns of a packed A are cut out only if nothing is left that needs all of them.
    wanted: dict[ir.Node, int] = {}
    for change in found.values():
        if change is not None and change.split is not None:
            wanted[change.split] = wanted.get(change.split, 0) + 1
    for scales in {id(node.inputs[2]): node.inputs[2] for node in found}.values():
        if scales is not None and _is_half(weights.matrix(scales)):
            store_in_half(graph, scales)
    used = set()
    for node, change in found.items():
        whole = change is None or change.split is None or wanted[change.split] == len(change.split.outputs)
        used.add(_fuse(graph, node, change if whole else None))
    for name in sorted(used):
        inputs, body = _FUNCTIONS[name]
        functions.define(model, f"{name} <{', '.join(ATTRIBUTES)}> {inputs} => (y)", body)
    return len(found)


def _fits(node: ir.Node) -> bool:
    """Whether the kernel computes it: int8 activations, and nothing but zero points in integers and a bias."""
    if node.op_type != "MatMulNBits" or any(value is not None for value in node.inputs[4:5]):
        return False
    if any(value is not None and value.dtype != ir.DataType.UINT8 for value in node.inputs[3:4]):
        return False
    attributes = {name: node.attributes.get_int(name, 0) for name in ("bits", "block_size", "accuracy_level")}
    x, scales = node.inputs[0], node.inputs[2]
    return (
        has_operator(attributes["bits"], attributes["block_size"])
        and attributes["accuracy_level"] == INT8_COMPUTE
        and x is not None
        and scales is not None
        and scales.dtype == ir.DataType.FLOAT
    )


def _change(node: ir.Node) -> _Change | None:
    """The low-rank change of a product, where it is of this form and nothing else reads the product."""
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or uses[0][0].op_type != "Add" or node.outputs[0].is_graph_output():
        return None
    add, place = uses[0]
    second = _only_used_by(add.inputs[1 - place], "MatMul")
    if second is None:
        return None
    low, b = second.inputs
    split, columns = None, None
    producer = None if low is None else low.producer()
    if producer is not None and producer.op_type == "Split":
        assert producer.inputs[1] is not None
        split, sizes = producer, weights.matrix(producer.inputs[1])
        index = next(place for place, output in enumerate(producer.outputs) if output is low)
        columns = int(sizes[:index].sum()), int(sizes[: index + 1].sum())
        producer = None if producer.inputs[0] is None else producer.inputs[0].producer()
    if producer is None or producer.op_type != "Mul":
        return None
    for first_place in (0, 1):
        first, rows = producer.inputs[first_place], producer.inputs[1 - first_place]
        made = None if first is None else first.producer()
        if made is None or made.op_type != "MatMul" or made.inputs[0] is not node.inputs[0]:
            continue
        a = made.inputs[1]
        if rows is None or a is None or b is None or not _of_rows(rows) or _stored(a) is None or _stored(b) is None:
            continue
        rank = weights.matrix(_stored(a) or a).shape[1]
        return _Change(add, split, rows, a, b, columns or (0, rank))
    return None


def _fuse(graph: ir.Graph, node: ir.Node, change: _Change | None) -> str:
    """Put the operator in the product's place; returns its name."""
    attributes = {name: node.attributes.get_int(name) for name in ATTRIBUTES}
    scales = node.inputs[2]
    assert scales is not None
    given = [*node.inputs, *[None] * (6 - len(node.inputs))]
    operands = [*given[:2], _stored(scales) or scales, given[3], given[5]]
    result, name = node, PLAIN
    if change is not None:
        a, b = _stored(change.a), _stored(change.b)
        assert a is not None
        operands += [change.rows, _columns(graph, a, change.columns), b]
        result, name = change.add, LOW_RANK
    while operands[-1] is None:
        operands.pop()
    fused = weights.add_node(result, name, operands, domain=functions.DOMAIN, **attributes)
    weights.replace_value(result.outputs[0], fused.outputs[0])
    if change is not None:
        _remove(graph, change.add)
    graph.remove(node, safe=True)
    wide = scales.producer()
    if wide is not None and not scales.uses():
        graph.remove(wide, safe=True)
    return name


def _remove(graph: ir.Graph, node: ir.Node) -> None:
    """Remove a node that nothing reads, and what only it read, down to the product itself."""
    if any(output.uses() for output in node.outputs) or node.op_type == "MatMulNBits":
        return
    before = [value for value in node.inputs if value is not None]
    graph.remove(node, safe=True)
    for value in before:
        producer = value.producer()
        if producer is not None and producer.op_type in ("MatMul", "Mul", "Split", "Cast"):
            if producer.graph is not None:
                _remove(graph, producer)
        elif value.is_initializer():
            weights.drop_unused(graph, [value])


def _columns(graph: ir.Graph, a: ir.Value, columns: tuple[int, int]) -> ir.Value:
    values = weights.matrix(a)
    if columns == (0, values.shape[1]):
        return a
    start, end = columns
    part = np.ascontiguousarray(values[:, start:end])
    value = weights.new_constant(graph, f"{a.name}.{start}", part)
    weights.note_parts(value, weights.parts(a))
    return value


def _is_half(values: weights.Array) -> bool:
    return bool((in_half(values) == values).all())


def _stored(value: ir.Value) -> ir.Value | None:
    """The constant matrix behind a value: itself, or what is cast to it."""
    producer = value.producer()
    if producer is not None and producer.op_type == "Cast":
        inner = producer.inputs[0]
        return inner if weights.constant_matrix(inner) else None
    return value if weights.constant_matrix(value) else None


def _of_rows(value: ir.Value | None) -> bool:
    """Whether a factor depends on the row: it is computed, where an adapter's own factors are constants."""
    return value is not None and not value.is_initializer() and _stored(value) is None


def _only_used_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    if node is None or node.op_type != op_type or value is None or len(list(value.uses())) != 1:
        return None
    return node
