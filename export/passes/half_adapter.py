"""The adapter's matrices stored in half the bytes: float32 in the graph, float16 in the file.

weight -> Cast(float16 weight), which onnxruntime folds when it loads the graph

What the adapter adds to a quantized file would otherwise be an eighth of it. 11 bits of a small correction lose less
than a thousandth of it.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir

from . import weights

SMALLEST = 1024  # elements
LARGEST = 6e4  # of float16, with some room


def store_adapter_in_half(model: ir.Model) -> int:
    """Returns how many matrices are stored in float16; those with values that it cannot hold stay."""
    graph = model.graph
    count = 0
    for value in list(graph.initializers.values()):
        if not _fits(value):
            continue
        store_in_half(graph, value)
        count += 1
    return count


def store_in_half(graph: ir.Graph, value: ir.Value) -> None:
    """Put a Cast of float16 values in a constant's place."""
    values = weights.matrix(value)
    name = f"{value.name}.fp16"
    half = weights.new_weight(graph, name, partial(_half, values), values.shape, ir.DataType.FLOAT16)
    weights.note_parts(half, weights.parts(value))
    first = next(node for node in graph if value in node.inputs)
    cast = weights.add_node(first, "Cast", [half], to=int(ir.DataType.FLOAT))
    weights.replace_value(value, cast.outputs[0])
    weights.drop_unused(graph, [value])


def in_half(values: weights.Array) -> weights.Array:
    """float32 values as float16 holds them; infinite where it does not."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32)


def _half(values: weights.Array) -> weights.Array:
    return values.astype(np.float16)


def _fits(value: ir.Value) -> bool:
    if value.dtype != ir.DataType.FLOAT or not weights.constant_matrix(value) or not weights.is_adapter(value):
        return False
    if value.is_graph_output() or not value.uses():
        return False
    values = weights.matrix(value)
    return values.size >= SMALLEST and bool(np.abs(values).max() <= LARGEST)
