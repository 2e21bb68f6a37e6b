"""SwiGLU's two products with int4 or int8 weights and what combines them as one operator of this project.

Mul(QuickGelu(QuantizedMatMul(x, ...)), QuantizedMatMul(x, ...)) -> imsm.QuantizedSwiGLU, a function of the graph
"""

from __future__ import annotations

import onnx_ir as ir

from . import functions, weights
from .quantized_matmul import ATTRIBUTES, LOW_RANK, PLAIN

NAMES = {PLAIN: "QuantizedSwiGLU", LOW_RANK: "QuantizedSwiGLULowRank"}
_MATRIX, _ROWS, _LOW_RANK = slice(1, 5), 5, slice(6, 8)  # inputs of a product
_PARTS = ("weights", "scales", "zero_points", "bias")
_GATE, _UP = (", ".join(f"{name}_{part}" for part in _PARTS) for name in ("gate", "up"))
_GATE_CHANGE, _UP_CHANGE = "gate_a, gate_b", "up_a, up_b"


def fuse_quantized_swiglu(model: ir.Model) -> int:
    """Returns how many pairs of products became one operator."""
    used = set()
    count = 0
    for node in list(model.graph):
        found = _products(node)
        if found is None:
            continue
        silu, gate, up = found
        operands = [gate.inputs[0], *_matrix(gate), *_matrix(up)]
        if gate.op_type == LOW_RANK:
            operands += [gate.inputs[_ROWS], *gate.inputs[_LOW_RANK], *up.inputs[_LOW_RANK]]
        while operands[-1] is None:
            operands.pop()
        attributes = {name: gate.attributes.get_int(name) for name in ATTRIBUTES}
        name = NAMES[gate.op_type]
        fused = weights.add_node(node, name, operands, domain=functions.DOMAIN, **attributes)
        weights.replace_value(node.outputs[0], fused.outputs[0])
        for gone in (node, silu, gate, up):
            model.graph.remove(gone, safe=True)
        used.add(gate.op_type)
        count += 1
    for product in sorted(used):
        low_rank = product == LOW_RANK
        given = ", ".join(f"{name}: int = @{name}" for name in ATTRIBUTES)
        inputs = f"x, {_GATE}, {_UP}" + (f", rows, {_GATE_CHANGE}, {_UP_CHANGE}" if low_rank else "")
        call = f"{functions.DOMAIN}.{product} <{given}>"
        body = f"""
            gate = {call} (x, {_GATE}{f", rows, {_GATE_CHANGE}" if low_rank else ""})
            up = {call} (x, {_UP}{f", rows, {_UP_CHANGE}" if low_rank else ""})
            active = com.microsoft.QuickGelu <alpha: float = 1.0> (gate)
            y = Mul (active, up)
        """
        functions.define(model, f"{NAMES[product]} <{', '.join(ATTRIBUTES)}> ({inputs}) => (y)", body)
    return count


def _products(node: ir.Node) -> tuple[ir.Node, ir.Node, ir.Node] | None:
    """(activation, gate's product, the other one) of a Mul, where nothing else reads any of them."""
    if node.op_type != "Mul":
        return None
    for place in (0, 1):
        silu, up = _only(node.inputs[place]), _only(node.inputs[1 - place])
        if silu is None or up is None or silu.op_type != "QuickGelu" or silu.attributes.get_float("alpha", 0.0) != 1.0:
            continue
        gate = _only(silu.inputs[0])
        if gate is None or gate.op_type not in NAMES or up.op_type != gate.op_type:
            continue
        alike = all(gate.attributes.get_int(name) == up.attributes.get_int(name) for name in ATTRIBUTES)
        rows = gate.op_type == PLAIN or gate.inputs[_ROWS] is up.inputs[_ROWS]
        if alike and rows and gate.inputs[0] is up.inputs[0]:
            return silu, gate, up
    return None


def _matrix(product: ir.Node) -> list[ir.Value | None]:
    found = list(product.inputs[_MATRIX])
    return found + [None] * (4 - len(found))


def _only(value: ir.Value | None) -> ir.Node | None:
    """The node behind a value that is used once."""
    if value is None or len(list(value.uses())) != 1 or value.is_graph_output():
        return None
    return value.producer()
