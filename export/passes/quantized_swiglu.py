"""SwiGLU's two products with quantized weights and what combines them as one operator of this project."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from . import functions
from .graph import add_node, nodes_of, only_user, operand, replace_value
from .low_bits import MORE, computing
from .quantized_matmul import ATTRIBUTES, LOW_RANK, PLAIN
from .rewrite import Declined, Rewrite

NAMES = {PLAIN: "QuantizedSwiGLU", LOW_RANK: "QuantizedSwiGLULowRank"}
OTHER_ACTIVATION = Declined("its activation is not SiLU")
READ_TWICE = Declined("a part of it is read by something else too")
NO_PRODUCTS = Declined("its parts are not both products of this project's")
UNLIKE = Declined("only one of its products has a low-rank change")
OTHER_FORM = Declined("its products differ in size or in their weights' form")
OTHER_INPUT = Declined("its products have different inputs")
OTHER_ROWS = Declined("its low-rank changes have different rows")
_MATRIX, _ROWS, _LOW_RANK = range(1, 5), 5, slice(6, 8)  # inputs of a product
_PARTS = ("weights", "scales", "zero_points", "bias")
_GATE, _UP = (", ".join(f"{name}_{part}" for part in _PARTS) for name in ("gate", "up"))
_GATE_CHANGE, _UP_CHANGE = "gate_a, gate_b", "up_a, up_b"


@dataclass(frozen=True)
class _Gated:
    """Mul(activation(gate), up). gate, up: None where no node computes them."""

    combined: ir.Node
    activation: ir.Node
    gate: ir.Node | None
    up: ir.Node | None


def _candidates(model: ir.Model) -> Iterator[_Gated]:
    """Products of a value and an activation."""
    for node in nodes_of(model, "Mul"):
        made = [None if value is None else value.producer() for value in node.inputs]
        for activation, up in (made, made[::-1]):
            if activation is not None and activation.op_type == "QuickGelu":
                x = activation.inputs[0]
                yield _Gated(node, activation, None if x is None else x.producer(), up)
                break


def _check(found: _Gated) -> _Gated | Declined:
    gate, up = found.gate, found.up
    if found.activation.attributes.get_float("alpha", 0.0) != 1.0:
        return OTHER_ACTIVATION
    if gate is None or up is None or gate.op_type not in NAMES or up.op_type not in NAMES:
        return NO_PRODUCTS
    if any(only_user(node.outputs[0]) is None for node in (found.activation, gate, up)):
        return READ_TWICE
    if gate.op_type != up.op_type:
        return UNLIKE
    if gate.inputs[0] is not up.inputs[0]:
        return OTHER_INPUT
    if any(gate.attributes.get_int(name) != up.attributes.get_int(name) for name in ATTRIBUTES):
        return OTHER_FORM
    if gate.overload != up.overload:
        return OTHER_FORM
    return OTHER_ROWS if gate.op_type == LOW_RANK and gate.inputs[_ROWS] is not up.inputs[_ROWS] else found


def _rewrite(model: ir.Model, found: _Gated) -> None:
    gate, up = found.gate, found.up
    assert gate is not None
    assert up is not None
    operands = [gate.inputs[0], *(operand(product, place) for product in (gate, up) for place in _MATRIX)]
    if gate.op_type == LOW_RANK:
        operands += [gate.inputs[_ROWS], *gate.inputs[_LOW_RANK], *up.inputs[_LOW_RANK]]
    more = [operand(product, MORE[product.op_type]) for product in (gate, up)]
    attributes = {name: gate.attributes.get_int(name) for name in ATTRIBUTES}
    fused = add_node(found.combined, NAMES[gate.op_type], operands + more, domain=functions.DOMAIN, **attributes)
    fused.overload = gate.overload
    replace_value(found.combined.outputs[0], fused.outputs[0])
    for gone in (found.combined, found.activation, gate, up):
        model.graph.remove(gone, safe=True)
    _define(model, gate.op_type, gate.overload)


def _define(model: ir.Model, product: str, overload: str) -> None:
    low_rank = product == LOW_RANK
    given = ", ".join(f"{name}: int = @{name}" for name in ATTRIBUTES)
    inputs = f"x, {_GATE}, {_UP}" + (f", rows, {_GATE_CHANGE}, {_UP_CHANGE}" if low_rank else "")
    gate, up = f"x, {_GATE}", f"x, {_UP}"
    if low_rank:
        gate, up = f"{gate}, rows, {_GATE_CHANGE}", f"{up}, rows, {_UP_CHANGE}"
    if overload:  # of 5 and 6 bits
        inputs, gate, up = f"{inputs}, gate_more, up_more", f"{gate}, gate_more", f"{up}, up_more"
    call = f"{functions.DOMAIN}.{computing(product, overload) if overload else product} <{given}>"
    body = f"""
            gate = {call} ({gate})
            up = {call} ({up})
            active = com.microsoft.QuickGelu <alpha: float = 1.0> (gate)
            y = Mul (active, up)
        """
    functions.define(model, NAMES[product], ATTRIBUTES, inputs, "y", body, overload)


fuse_quantized_swiglu = Rewrite(
    "fuse_quantized_swiglu",
    "Mul(QuickGelu(QuantizedMatMul(x, ...)), QuantizedMatMul(x, ...)) -> imsm.QuantizedSwiGLU, a function of the graph",
    _candidates,
    _check,
    _rewrite,
)
