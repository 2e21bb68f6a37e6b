"""The functions of the operators whose weights have 5 or 6 bits, for an onnxruntime without kernels for them.

A code is 2^extra * high + low, where `weights` has `high` as a weight of 4 bits and `more` the bits of `low`: a product
is the sum of two products with weights of 4 bits. Those of `low` are made out of `more` by nodes that read constants
alone, which onnxruntime therefore runs once, when it loads the graph.
"""

from __future__ import annotations

import onnx_ir as ir

from . import functions
from .quantized_matmul import ATTRIBUTES, INPUTS, LOW_RANK, PLAIN, body

GATHER = "QuantizedGather"
MORE = {PLAIN: 5, LOW_RANK: 8}
"""The place of the input `more` of products."""
_GATHER_INPUTS = "ids, weights, more, scales, zero_points"
_HALVES = "QuantizedHalves"  # bytes -> two in one
_RIGHT, _LEFT = (f'BitShift <direction: string = "{direction}">' for direction in ("RIGHT", "LEFT"))
_MIDDLE = 8  # added to `low`: what a weight of 4 bits stands for without zero points is its code minus that


def overload(bits: int, zero_points: bool) -> str:
    """Which function of an operator a node with such weights has."""
    return f"bits{bits}" + ("_zero_points" if zero_points else "")


def computing(name: str, overload: str) -> str:
    """The function that computes what an overload of a product does: functions can call it."""
    return f"{name}_{overload}"


def define_low_bits(model: ir.Model, name: str, bits: int, zero_points: bool) -> None:
    """Add the function of an operator to the model, and what it calls."""
    functions.define(model, _low(bits), (), "weights, more", "low", _low_body(bits))
    which = overload(bits, zero_points)
    if name == GATHER:
        text = _gather_body(bits, zero_points)
        functions.define(model, GATHER, ("bits", "block_size"), _GATHER_INPUTS, "y", text, which)
        return
    if zero_points:
        functions.define(model, _HALVES, (), "bytes", "halves", _halves_body())
    inputs = f"{INPUTS[name]}, more"
    text = body(name, "Add (high_product, low_product)", _products(bits, zero_points))
    functions.define(model, computing(name, which), ATTRIBUTES, inputs, "y", text)
    given = ", ".join(f"{attribute}: int = @{attribute}" for attribute in ATTRIBUTES)
    call = f"y = {functions.DOMAIN}.{computing(name, which)} <{given}> ({inputs})"
    functions.define(model, name, ATTRIBUTES, inputs, "y", call, which)


def _low(bits: int) -> str:
    return f"QuantizedLowBits_bits{bits}"


def _products(bits: int, zero_points: bool) -> str:
    """high_product and low_product, whose sum is the product: the zero point is divided as codes are."""
    extra = bits - 4
    attributes = "K: int = @K, N: int = @N, bits: int = 4, block_size: int = @block_size, accuracy_level: int = 4"
    product = f"com.microsoft.MatMulNBits <{attributes}>"
    halves = f"{functions.DOMAIN}.{_HALVES}"
    points = f"""
        {_constant("extra", "uint8", extra)}
        {_constant("mask", "uint8", (1 << extra) - 1)}
        {_constant("middle", "uint8", _MIDDLE)}
        high_bytes = {_RIGHT} (zero_points, extra)
        high_points = {halves} (high_bytes)
        low_bits = BitwiseAnd (zero_points, mask)
        low_bytes = BitwiseOr (low_bits, middle)
        low_points = {halves} (low_bytes)
    """
    high_points, low_points = ("high_points", "low_points") if zero_points else ('""', '""')
    return f"""
        {points if zero_points else ""}
        {_constant("step", "float", 1 << extra)}
        high_scales = Mul (wide_scales, step)
        high_product = {product} (x, weights, high_scales, {high_points}, "", bias)
        low_weights = {functions.DOMAIN}.{_low(bits)} (weights, more)
        low_product = {product} (x, low_weights, wide_scales, {low_points})
    """


def _low_body(bits: int) -> str:
    """low + 8 as weights of 4 bits, in the shape of `weights`: (M, blocks, block_size / 2)."""
    extra = bits - 4
    fields = [extra * field for field in range(8 // extra)]
    return f"""
        {_constant("places", "int64", 0, 0, 2, 8 * extra)}
        {_constant("fields", "int64", 0, 0, 1, 8 * extra)}
        {_constant("moves", "uint8", *fields, shape=f"{len(fields)},1")}
        {_constant("mask", "uint8", (1 << extra) - 1)}
        {_constant("four", "uint8", 4)}
        {_constant("middle", "uint8", _MIDDLE * 17)}
        {_constant("flat", "int64", 0, -1)}
        {_constant("from", "int64", 0)}
        {_constant("one", "int64", 1)}
        {_constant("two", "int64", 2)}
        number0 = Constant <value_int: int = 0> ()
        number1 = Constant <value_int: int = 1> ()
        bytes = Reshape (more, places)
        even_bytes = Gather <axis: int = 2> (bytes, number0)
        even_rows = Reshape (even_bytes, fields)
        even_moved = {_RIGHT} (even_rows, moves)
        evens = BitwiseAnd (even_moved, mask)
        odd_bytes = Gather <axis: int = 2> (bytes, number1)
        odd_rows = Reshape (odd_bytes, fields)
        odd_moved = {_RIGHT} (odd_rows, moves)
        odds = BitwiseAnd (odd_moved, mask)
        odds_above = {_LEFT} (odds, four)
        both = BitwiseOr (evens, odds_above)
        padded = BitwiseOr (both, middle)
        rows = Reshape (padded, flat)
        shape = Shape (weights)
        blocks = Slice (shape, one, two)
        block_bytes = Shape <start: int = 2> (weights)
        end = Mul (blocks, block_bytes)
        cut = Slice (rows, from, end, one)
        low = Reshape (cut, shape)
    """


def _halves_body() -> str:
    """(N, blocks) to (N, blocks / 2 rounded up): two numbers of four bits a byte, the earlier one in the low half."""
    largest = 2**31 - 1
    return f"""
        {_constant("pads", "int64", 0, 0, 0, 1)}
        {_constant("from0", "int64", 0)}
        {_constant("from1", "int64", 1)}
        {_constant("end", "int64", largest)}
        {_constant("two", "int64", 2)}
        {_constant("four", "uint8", 4)}
        padded = Pad (bytes, pads)
        evens = Slice (bytes, from0, end, from1, two)
        odds = Slice (padded, from1, end, from1, two)
        moved = {_LEFT} (odds, four)
        halves = BitwiseOr (evens, moved)
    """


def _gather_body(bits: int, zero_points: bool) -> str:
    """(code - zero point) * scale of the rows `ids`."""
    extra = bits - 4
    points = (
        "point_rows = Gather (zero_points, flat) points = Cast <to: int = 1> (point_rows)"
        if zero_points
        else f"{_constant('middle', 'float', 1 << bits - 1)} shape = Shape (wide) points = Expand (middle, shape)"
    )
    return f"""
        {_constant("rest", "int64", -1)}
        {_constant("halves", "uint8", 0, 4)}
        {_constant("fifteen", "uint8", 15)}
        {_constant("mask", "uint8", (1 << extra) - 1)}
        {_constant("extra", "uint8", extra)}
        flat = Reshape (ids, rest)
        rows = Gather (weights, flat)
        more_rows = Gather (more, flat)
        low_rows = {functions.DOMAIN}.{_low(bits)} (rows, more_rows)
        row_column = Unsqueeze (rows, rest)
        row_halves = {_RIGHT} (row_column, halves)
        high = BitwiseAnd (row_halves, fifteen)
        high_bits = {_LEFT} (high, extra)
        low_column = Unsqueeze (low_rows, rest)
        low_halves = {_RIGHT} (low_column, halves)
        low_bits = BitwiseAnd (low_halves, mask)
        pairs = BitwiseOr (high_bits, low_bits)
        {_constant("places", "int64", 0, 0, -1)}
        codes = Reshape (pairs, places)
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
