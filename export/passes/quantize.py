"""Weight-only quantization of the frozen backbone: int4 or int8 in blocks, adapter and gate left in floating point.

A tied embedding and lm_head share one quantized tensor. Routers stay: they are small, and a rounded one sends tokens to
other experts.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from . import weights
from .graph import add_node, drop_unused, new_constant, nodes_of, only_user, operand, replace_value
from .quantizable import is_large, is_table, looks_up, multiplies_a_weight, why_not
from .quantization import Quantization, Quantized
from .quantize_experts import quantize_experts, why_experts_stay
from .quantized_tensors import QuantizedTensors
from .rewrite import Declined, Outcome, Rewrite

PORTABLE_EXPERTS = Declined("the portable form keeps experts that older kernels know")


class Quantizer:
    """The pass with its settings; `done` is what it did."""

    name = "quantize"
    pattern = (
        "MatMul(x, W) [+ bias], Gemm, FusedMatMul with transB -> com.microsoft.MatMulNBits; "
        "Gather(embedding) -> com.microsoft.GatherBlockQuantized; MoE -> com.microsoft.QMoE"
    )

    def __init__(self, settings: Quantization) -> None:
        self.settings = settings
        self.done = Quantized()
        self._tensors = QuantizedTensors(settings, self.done)
        self._expert_tensors: set[ir.Value] = set()

    def __call__(self, model: ir.Model) -> Outcome:
        """Quantize every large matrix of the backbone."""
        outcome = Rewrite(self.name, self.pattern, _candidates, self._check, self._rewrite)(model)
        made = self._tensors.made | self._expert_tensors  # their scales are in floating point
        for value in model.graph.initializers.values():
            if is_large(value) and value not in made and weights.is_backbone(value) and not is_table(value):
                self.done.kept[str(value.name)] = weights.nbytes(value)
        return outcome

    def _check(self, node: ir.Node) -> ir.Node | Declined:
        if node.op_type == "Gather":
            return node
        if node.op_type != "MoE":
            return why_not(node) or node
        if not self.settings.experts:
            return PORTABLE_EXPERTS
        return why_experts_stay(node, self.settings.block_size) or node

    def _rewrite(self, model: ir.Model, node: ir.Node) -> None:
        if node.op_type == "Gather":
            self._lookup(model.graph, node)
        elif node.op_type == "MoE":
            self._experts(model.graph, node)
        else:
            self._product(model.graph, node)

    def _product(self, graph: ir.Graph, node: ir.Node) -> None:
        """One product with a weight of the backbone."""
        weight = node.inputs[1]
        assert weight is not None
        in_by_out = not (node.attributes.get_int("transB", 0))
        tensors = self._tensors.of(graph, weight, in_by_out)
        shape = weights.matrix(weight).shape
        inputs, outputs = shape if in_by_out else shape[::-1]
        result, bias = node.outputs[0], None
        if node.op_type == "Gemm":
            bias = operand(node, 2)
        else:
            result, bias = _with_bias(node)
        after = result.producer()
        assert after is not None
        fused = add_node(
            after,
            "MatMulNBits",
            [node.inputs[0], tensors.packed, tensors.scales, tensors.zero_points, None, bias],
            domain="com.microsoft",
            K=int(inputs),
            N=int(outputs),
            bits=tensors.bits,
            block_size=self.settings.block_size,
            accuracy_level=0,
        )
        replace_value(result, fused.outputs[0])
        if after is not node:
            graph.remove(after, safe=True)
        graph.remove(node, safe=True)
        drop_unused(graph, [weight])
        self.done.matrices += 1

    def _lookup(self, graph: ir.Graph, node: ir.Node) -> None:
        """The lookup of the tokens' embeddings, out of the lm_head's tensor where they are tied."""
        weight = node.inputs[0]
        assert weight is not None
        tensors = self._tensors.of(graph, weight, in_by_out=False)
        packed = tensors.packed
        width, block = weights.matrix(weight).shape[1], self.settings.block_size
        blocks = -(-width // block)
        sizes = np.array([-1, blocks * block * tensors.bits // 8], np.int64)
        flat = new_constant(graph, f"row_shape_of.{packed.name}", sizes)
        rows = add_node(node, "Reshape", [packed, flat])  # `share_storage` makes a view of the file of it
        looked_up = add_node(
            node,
            "GatherBlockQuantized",
            [rows.outputs[0], node.inputs[1], tensors.scales, tensors.zero_points],
            domain="com.microsoft",
            bits=tensors.bits,
            block_size=block,
            gather_axis=0,
            quantize_axis=1,
        ).outputs[0]
        if width % block:
            first, last = (
                _constant(graph, f"{name}_of.{packed.name}", at) for name, at in (("from", 0), ("to", width))
            )
            axis = _constant(graph, f"axis_of.{packed.name}", -1)
            looked_up = add_node(node, "Slice", [looked_up, first, last, axis]).outputs[0]
        replace_value(node.outputs[0], looked_up)
        graph.remove(node, safe=True)
        drop_unused(graph, [weight])
        self.done.embeddings += 1

    def _experts(self, graph: ir.Graph, node: ir.Node) -> None:
        """The experts of one layer."""
        settings = self.settings
        found = quantize_experts(graph, node, settings.bits, settings.block_size, settings.symmetric)
        self._expert_tensors |= set(found.made)
        self.done.experts += 1
        self.done.expert_weights += found.names
        self.done.bytes_before += found.bytes_before
        self.done.widths[settings.bits] += found.size
        self.done.replaced += found.replaced


def _candidates(model: ir.Model) -> Iterator[ir.Node]:
    """Products and lookups with matrices of the backbone, and experts."""
    for node in nodes_of(model, "MatMul", "FusedMatMul", "Gemm", "Gather", "MoE"):
        if multiplies_a_weight(node) or looks_up(node) or node.op_type == "MoE":
            yield node


def _constant(graph: ir.Graph, name: str, number: int) -> ir.Value:
    return new_constant(graph, name, np.array([number], np.int64))


def _with_bias(node: ir.Node) -> tuple[ir.Value, ir.Value | None]:
    """(the sum, the bias) where a constant vector is added to a product and nothing else reads it; else (product,
    None)."""
    product = node.outputs[0]
    add = only_user(product, "Add")
    if add is not None:
        other = next((value for value in add.inputs if value is not product), None)
        if other is not None and other.is_initializer() and other.const_value is not None:
            shape = other.const_value.shape
            if len(shape) == 1 and shape[0] != 1 and weights.is_backbone(other):
                return add.outputs[0], other
    return product, None
