"""Products with quantized weights as one operator of this project, with the adapter's low-rank change of them.

The runtime has a kernel for it (`runtime/kernels`). Wherever that is not in use, onnxruntime runs the function's own
nodes, so that the file needs nothing but onnxruntime.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from . import functions, weights
from .graph import add_node, nodes_of, operand, replace_value
from .half_adapter import in_half, store_in_half
from .low_rank_change import COLUMNS_READ, Change, change_of, cut_columns, remove_change, stored_matrix
from .quantize_experts import INT8_COMPUTE
from .rewrite import Declined, JointRewrite, Outcome

BITS = (4, 8)
BLOCK_SIZES = (32, 64, 128)
ATTRIBUTES = ("K", "N", "bits", "block_size")
PLAIN, LOW_RANK = "QuantizedMatMul", "QuantizedMatMulLowRank"
FLOAT_COMPUTE = Declined("it computes in floating point")
FLOAT_ZERO_POINTS = Declined("its zero points are not integers")
GROUPS = Declined("its blocks have their own order")
_SCALES, _ZERO_POINTS, _GROUPS, _BIAS = 2, 3, 4, 5  # inputs of MatMulNBits
INPUTS = {
    PLAIN: "x, weights, scales, zero_points, bias",
    LOW_RANK: "x, weights, scales, zero_points, bias, rows, a, b",
}
_PRODUCT = """com.microsoft.MatMulNBits <K: int = @K, N: int = @N, bits: int = @bits, block_size: int = @block_size,
    accuracy_level: int = 4> (x, weights, wide_scales, zero_points, "", bias)"""
_CHANGED = """
    wide_a = Cast <to: int = 1> (a)
    wide_b = Cast <to: int = 1> (b)
    low = MatMul (x, wide_a)
    kept = Mul (low, rows)
    change = MatMul (kept, wide_b)
    y = Add (plain, change)
"""


@dataclass(frozen=True)
class _Product:
    """A product that becomes an operator. change: what it can absorb, or why it stays apart; None: there is none."""

    node: ir.Node
    change: Change | Declined | None

    @property
    def scales(self) -> ir.Value:
        found = self.node.inputs[_SCALES]
        assert found is not None
        return found


def has_operator(bits: int, block_size: int) -> bool:
    """Whether products with weights in this form become the project's own operator."""
    return bits in BITS and block_size in BLOCK_SIZES


def body(name: str, product: str = _PRODUCT, before: str = "") -> str:
    """The nodes of an operator's function. product: the one whose output is the product, after the nodes `before`."""
    nodes = f"wide_scales = Cast <to: int = 1> (scales) {before}"
    return f"{nodes} y = {product}" if name == PLAIN else f"{nodes} plain = {product} {_CHANGED}"


def _check(node: ir.Node) -> _Product | Declined:
    """The kernel computes with int8 activations, and with nothing but zero points in integers and a bias."""
    bits, block_size, level = (node.attributes.get_int(name, 0) for name in ("bits", "block_size", "accuracy_level"))
    zero_points, scales = operand(node, _ZERO_POINTS), node.inputs[_SCALES]
    if not has_operator(bits, block_size):
        return Declined(f"{bits} bits in blocks of {block_size} have no operator")
    if level != INT8_COMPUTE:
        return FLOAT_COMPUTE
    assert scales is not None
    assert scales.dtype is not None
    if scales.dtype != ir.DataType.FLOAT:
        return Declined(f"its scales are {scales.dtype.name.lower()}")
    if zero_points is not None and zero_points.dtype != ir.DataType.UINT8:
        return FLOAT_ZERO_POINTS
    return GROUPS if operand(node, _GROUPS) is not None else _Product(node, change_of(node))


def _rewrite(model: ir.Model, found: Sequence[_Product]) -> Outcome:
    # Columns of a packed A are cut out only if nothing is left that needs all of them.
    wanted = Counter(product.change.split for product in found if isinstance(product.change, Change))
    for scales in {product.scales: None for product in found}:
        if _is_half(weights.matrix(scales)):
            store_in_half(model.graph, scales)
    outcome, used = Outcome(len(found)), set()
    for product in found:
        change = product.change
        if isinstance(change, Change) and change.split is not None:
            change = change if wanted[change.split] == len(change.split.outputs) else COLUMNS_READ
        if isinstance(change, Declined):
            outcome.decline(change)
            change = None
        _fuse(model.graph, product, change)
        used.add(PLAIN if change is None else LOW_RANK)
    for name in sorted(used):
        functions.define(model, name, ATTRIBUTES, INPUTS[name], "y", body(name))
    return outcome


def _fuse(graph: ir.Graph, product: _Product, change: Change | None) -> None:
    """Put the operator in the product's place."""
    node, scales = product.node, product.scales
    attributes = {name: node.attributes.get_int(name) for name in ATTRIBUTES}
    operands = [*node.inputs[:2], stored_matrix(scales) or scales, operand(node, _ZERO_POINTS), operand(node, _BIAS)]
    result, name = node, PLAIN
    if change is not None:
        a, b = stored_matrix(change.a), stored_matrix(change.b)
        assert a is not None
        operands += [change.rows, cut_columns(graph, a, change.columns), b]
        result, name = change.add, LOW_RANK
    fused = add_node(result, name, operands, domain=functions.DOMAIN, **attributes)
    replace_value(result.outputs[0], fused.outputs[0])
    if change is not None:
        remove_change(graph, change.add)
    graph.remove(node, safe=True)
    wide = scales.producer()
    if wide is not None and not scales.uses():
        graph.remove(wide, safe=True)


def _is_half(values: weights.Array) -> bool:
    return bool((in_half(values) == values).all())


fuse_quantized_matmul = JointRewrite(
    "fuse_quantized_matmul",
    "MatMulNBits(x, W) [+ MatMul(Mul(MatMul(x, A), rows), B)] -> imsm.QuantizedMatMul(x, W, ...), "
    "a function of the graph",
    lambda model: nodes_of(model, "MatMulNBits"),
    _check,
    _rewrite,
)
