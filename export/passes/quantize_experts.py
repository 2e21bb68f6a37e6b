"""Weight-only quantization of experts: MoE -> QMoE, which routes in the same way and reads a fraction of the bytes.

The kernel for int8 rounds activations to int8 whatever its settings. So that every graph can first be verified in
floating point, int8 experts stay MoE nodes with the rounded values until `finish_experts` packs them.

QMoE: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from ..quantization.weight_format import QuantizedWeight, dequantize, round_to_nearest
from . import weights
from .graph import add_node, drop_unused, new_constant, nodes_of, operand, replace_value
from .rewrite import Declined

INT8_COMPUTE = 4  # the accuracy_level of QMoE and of MatMulNBits
COMPUTED = Declined("the experts' weights are computed")
CHANGED = Declined("something else reads the experts' weights too, such as an adapter")
HALF = Declined("the experts compute in half precision")
_PACKED = "imsm.packed"
_MATRICES = (2, 4)  # the places of the up and the down projections among MoE's inputs


@dataclass(frozen=True)
class PackedExperts:
    """What `quantize_experts` made of one node. names: the weights of the traced module. made: initializers that are
    part of it. size: how many numbers. replaced: the graph's weights in whose place they are."""

    names: tuple[str, ...]
    made: tuple[ir.Value, ...]
    size: int
    bytes_before: int
    replaced: tuple[str, ...]


def why_experts_stay(node: ir.Node, block_size: int) -> Declined | None:
    """Why the weights (experts, out, in) of a MoE node stay; None: they do not."""
    for value in (operand(node, place) for place in _MATRICES):
        if value is None or value.const_value is None or not value.is_initializer():
            return COMPUTED
        if len(value.uses()) != 1 or not weights.is_backbone(value):
            return CHANGED
        if value.dtype != ir.DataType.FLOAT:
            return HALF
        if value.const_value.shape.numpy()[2] % block_size:
            return Declined(f"the experts' inputs are not whole blocks of {block_size}")
    return None


def quantize_experts(graph: ir.Graph, node: ir.Node, bits: int, block_size: int, symmetric: bool) -> PackedExperts:
    """Quantize the weights of a MoE node that `why_experts_stay` does not object to."""
    up, down = (value for value in (operand(node, place) for place in _MATRICES) if value is not None)
    packed = [_rounded(value, bits, block_size, symmetric) for value in (up, down)]
    names = (*weights.parts(up), *weights.parts(down))
    before = weights.nbytes(up) + weights.nbytes(down)
    size = sum(weights.matrix(value).size for value in (up, down))
    replaced = (str(up.name), str(down.name))
    if bits == 4:
        return PackedExperts(names, _pack(graph, node, packed, accuracy_level=0), size, before, replaced)
    for value, part in zip((up, down), packed, strict=True):
        shape = weights.matrix(value).shape
        value.const_value = ir.tensor(dequantize(part, shape[2]).reshape(shape), name=value.name)
    node.meta[_PACKED] = packed
    return PackedExperts(names, (up, down), size, before, replaced)


def finish_experts(model: ir.Model) -> int:
    """Let quantized experts round their activations to int8; returns how many nodes."""
    count = 0
    for node in nodes_of(model, "MoE", "QMoE"):
        if node.op_type == "QMoE":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", INT8_COMPUTE)
            count += 1
        elif _PACKED in node.meta:
            _pack(model.graph, node, node.meta[_PACKED], INT8_COMPUTE)
            count += 1
    return count


def _rounded(value: ir.Value, bits: int, block_size: int, symmetric: bool) -> QuantizedWeight:
    """The rows of all experts, one after the other."""
    values = weights.matrix(value)
    rows = values.reshape(-1, values.shape[2]).astype(np.float32)
    return round_to_nearest(rows, bits, block_size, symmetric)


def _pack(graph: ir.Graph, node: ir.Node, packed: list[QuantizedWeight], accuracy_level: int) -> tuple[ir.Value, ...]:
    """A QMoE node in the place of a MoE node; returns its weights, scales and zero points."""
    old = [value for place in _MATRICES if (value := node.inputs[place]) is not None]
    tensors: list[list[ir.Value | None]] = []
    for value, part in zip(old, packed, strict=True):
        experts, outputs, _ = weights.matrix(value).shape
        arrays = {f"int{part.bits}": part.packed, "scales": part.scales, "zero_points": part.zero_points}
        tensors.append(
            [
                None
                if array is None
                else new_constant(graph, f"{value.name}.{name}", array.reshape(experts, outputs, -1))
                for name, array in arrays.items()
            ]
        )
    (up, up_scales, up_points), (down, down_scales, down_points) = tensors
    biases = [operand(node, place) for place in (3, 5)]
    operands = [*node.inputs[:2], up, up_scales, biases[0], down, down_scales, biases[1]]
    if up_points is not None:
        operands += [None, None, None, up_points, down_points]
    attributes: dict[str, Any] = dict(
        node.attributes,
        expert_weight_bits=packed[0].bits,
        block_size=packed[0].block_size,
        accuracy_level=accuracy_level,
        weights_prepacked=0,
    )
    fused = add_node(node, "QMoE", operands, domain="com.microsoft", **attributes)
    replace_value(node.outputs[0], fused.outputs[0])
    graph.remove(node, safe=True)
    drop_unused(graph, old)
    return tuple(value for part in tensors for value in part if value is not None)
