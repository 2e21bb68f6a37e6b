"""Weights that the graph only rearranges, such as the interleaved rows of experts, rearranged in the file.

onnxruntime would copy gigabytes at every start or step; constant folding copies them here, and stops at a size. The
copy is made while the file is written, one weight at a time. Matrices are `lay_out_weights`' business.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from .graph import nodes_of
from .rewrite import Declined, Rewrite
from .weight_layout import Layout, replace_laid_out

READ_TWICE = Declined("the weight is read by something else too")  # and stays, so that it is stored once
COMPUTED = Declined("the shape is computed")
COPIES = Declined("the shape copies a dimension of the weight")


@dataclass(frozen=True)
class _LaidOut:
    node: ir.Node
    weight: ir.Value
    layout: Layout


def _candidates(model: ir.Model) -> Iterator[ir.Node]:
    for node in nodes_of(model, "Reshape", "Transpose"):
        weight = node.inputs[0]
        if weight is None or not weight.is_initializer() or weight.const_value is None:
            continue
        if node.op_type == "Reshape" or len(weight.const_value.shape) > 2:
            yield node


def _check(node: ir.Node) -> _LaidOut | Declined:
    weight = node.inputs[0]
    assert weight is not None
    if len(weight.uses()) > 1:
        return READ_TWICE
    if node.op_type == "Transpose":
        axes = node.attributes.get_ints("perm")  # NumPy's default is ONNX's, the axes in reverse
        return _LaidOut(node, weight, lambda array: array.transpose(axes))
    shape = node.inputs[1]
    if shape is None or shape.const_value is None:
        return COMPUTED
    sizes = [int(size) for size in shape.const_value.numpy()]
    return COPIES if 0 in sizes else _LaidOut(node, weight, lambda array: array.reshape(sizes))


fold_layout = Rewrite(
    "fold_layout",
    "Reshape(weight, constant), Transpose(weight of 3 or more dimensions) -> weight",
    _candidates,
    _check,
    lambda model, found: replace_laid_out(model.graph, [found.node], found.weight, "laid_out", found.layout),
)
