"""The adapter's matrices stored in half the bytes: float32 in the graph, float16 in the file.

What the adapter adds to a quantized file would otherwise be an eighth of it. 11 bits of a small correction lose less
than a thousandth of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from . import weights
from .graph import add_node, drop_unused, new_weight, replace_value
from .rewrite import Declined, Rewrite

SMALLEST = 1024  # elements
LARGEST = 6e4  # of float16, with some room
SMALL = Declined(f"the matrix has fewer than {SMALLEST} elements")
TOO_LARGE = Declined("its values are too large for float16")


def store_in_half(graph: ir.Graph, value: ir.Value) -> None:
    """Put a Cast of float16 values in a constant's place."""
    values = weights.matrix(value)
    half = new_weight(graph, f"{value.name}.fp16", lambda: values.astype(np.float16), values.shape, ir.DataType.FLOAT16)
    weights.note_parts(half, weights.parts(value))
    first = next(node for node in graph if value in node.inputs)
    cast = add_node(first, "Cast", [half], to=int(ir.DataType.FLOAT))
    replace_value(value, cast.outputs[0])
    drop_unused(graph, [value])


def in_half(values: weights.Array) -> weights.Array:
    """float32 values as float16 holds them; infinite where it does not."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32)


def _candidates(model: ir.Model) -> Iterator[ir.Value]:
    """The adapter's float32 matrices that something reads."""
    for value in list(model.graph.initializers.values()):
        matrix = value.dtype == ir.DataType.FLOAT and weights.constant_matrix(value)
        if matrix and weights.is_adapter(value) and value.uses() and not value.is_graph_output():
            yield value


def _check(value: ir.Value) -> ir.Value | Declined:
    values = weights.matrix(value)
    if values.size < SMALLEST:
        return SMALL
    return value if np.abs(values).max() <= LARGEST else TOO_LARGE


store_adapter_in_half = Rewrite(
    "store_adapter_in_half",
    "weight -> Cast(float16 weight), which onnxruntime folds when it loads the graph",
    _candidates,
    _check,
    lambda model, value: store_in_half(model.graph, value),
)
