"""Weight-only quantization of the frozen backbone: int4 or int8 in blocks, adapter and gate left in floating point.

MatMul(x, W) [+ bias], Gemm, FusedMatMul(transB)  ->  com.microsoft.MatMulNBits
Gather(embedding)                                  ->  com.microsoft.GatherBlockQuantized
MoE                                                ->  QMoE (`quantize_experts`)

A tied embedding and lm_head share one quantized tensor. Routers stay: they are small, and a rounded one sends tokens to
other experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from ..errors import TraceError
from ..quantization.gptq import layer_name
from ..quantization.weight_format import QuantizedWeight, round_to_nearest
from . import weights
from .half_adapter import in_half
from .quantize_experts import INT8_COMPUTE, quantize_experts

PRODUCTS = ("MatMul", "FusedMatMul", "Gemm", "MatMulNBits", "MoE", "QMoE", "GroupQueryAttention")
SMALLEST = 1024  # elements; smaller matrices are not worth a node of their own kind


@dataclass(frozen=True)
class Quantization:
    """bits: 4 or 8. calibrated: weights that were quantized with data, by their layer's name in the causal LM; all
    others are rounded to the nearest. experts: whether those are quantized, for which onnxruntime must be new.
    half_scales: whether scales are rounded to float16 where that changes none of them by a thousandth.

    The nodes compute in floating point; `use_int8_compute` changes that once the file has been verified."""

    bits: int
    block_size: int = 32
    symmetric: bool = True
    calibrated: Mapping[str, QuantizedWeight] = field(default_factory=dict)
    experts: bool = True
    half_scales: bool = False


@dataclass
class Quantized:
    """What happened. bytes_before, bytes_after: of the matrices that were quantized. kept: matrices of the backbone
    that stayed in floating point, by name, with their bytes. weights: what every weight of the traced module became.
    expert_weights: those of its weights that are of experts, all rounded to the nearest."""

    matrices: int = 0
    embeddings: int = 0
    experts: int = 0
    calibrated: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    kept: dict[str, int] = field(default_factory=dict)
    weights: dict[str, QuantizedWeight] = field(default_factory=dict)
    expert_weights: list[str] = field(default_factory=list)

    def as_dict(self, settings: Quantization) -> dict[str, Any]:
        """For the manifest."""
        return {
            "bits": settings.bits,
            "block_size": settings.block_size,
            "symmetric": settings.symmetric,
            "matrices": self.matrices,
            "embeddings": self.embeddings,
            "experts": self.experts,
            "calibrated": self.calibrated,
            "bytes": self.bytes_after,
            "kept_bytes": sum(self.kept.values()),
        }


class _Quantizer:
    def __init__(self, model: ir.Model, settings: Quantization) -> None:
        self.graph = model.graph
        self.settings = settings
        self.done = Quantized()
        self.tensors: dict[tuple[int, bool], tuple[ir.Value, ir.Value, ir.Value | None]] = {}
        self.gone: list[ir.Value] = []
        self.made: list[ir.Value] = []  # that are not in `tensors`

    def matmul(self, node: ir.Node) -> None:
        """One product with a weight of the backbone."""
        weight = node.inputs[1]
        assert weight is not None
        in_by_out = not (node.attributes.get_int("transB", 0))
        packed, scales, zero_points = self._tensors(weight, in_by_out)
        shape = weights.matrix(weight).shape
        inputs, outputs = shape if in_by_out else shape[::-1]
        result, bias = node.outputs[0], None
        if node.op_type == "Gemm":
            bias = node.inputs[2] if len(node.inputs) > 2 else None
        else:
            result, bias = _with_bias(node)
        after = result.producer()
        assert after is not None
        operands: list[ir.Value | None] = [node.inputs[0], packed, scales, zero_points, None, bias]
        while operands[-1] is None:
            operands.pop()
        fused = weights.add_node(
            after,
            "MatMulNBits",
            operands,
            domain="com.microsoft",
            K=int(inputs),
            N=int(outputs),
            bits=self.settings.bits,
            block_size=self.settings.block_size,
            accuracy_level=0,
        )
        weights.replace_value(result, fused.outputs[0])
        if after is not node:
            self.graph.remove(after, safe=True)
        self.graph.remove(node, safe=True)
        self.gone.append(weight)
        self.done.matrices += 1

    def gather(self, node: ir.Node) -> None:
        """The lookup of the tokens' embeddings, out of the lm_head's tensor where they are tied."""
        weight = node.inputs[0]
        assert weight is not None
        packed, scales, zero_points = self._tensors(weight, in_by_out=False)
        width, block = weights.matrix(weight).shape[1], self.settings.block_size
        blocks = -(-width // block)
        sizes = np.array([-1, blocks * block * self.settings.bits // 8], np.int64)
        flat = weights.new_constant(self.graph, f"{packed.name}.row_shape", sizes)
        rows = weights.add_node(node, "Reshape", [packed, flat])  # `share_storage` makes a view of the file of it
        operands = [rows.outputs[0], node.inputs[1], scales, *([] if zero_points is None else [zero_points])]
        looked_up = weights.add_node(
            node,
            "GatherBlockQuantized",
            operands,
            domain="com.microsoft",
            bits=self.settings.bits,
            block_size=block,
            gather_axis=0,
            quantize_axis=1,
        ).outputs[0]
        if width % block:
            bounds = [self._constant(f"{packed.name}.{name}", value) for name, value in (("from", 0), ("to", width))]
            axis = self._constant(f"{packed.name}.axis", -1)
            looked_up = weights.add_node(node, "Slice", [looked_up, *bounds, axis]).outputs[0]
        weights.replace_value(node.outputs[0], looked_up)
        self.graph.remove(node, safe=True)
        self.gone.append(weight)
        self.done.embeddings += 1

    def experts(self, node: ir.Node) -> None:
        """The experts of one layer."""
        settings = self.settings
        found = quantize_experts(self.graph, node, settings.bits, settings.block_size, settings.symmetric)
        if found is None:
            return
        self.made += found.made
        self.done.experts += 1
        self.done.expert_weights += found.names
        self.done.bytes_before += found.bytes_before
        self.done.bytes_after += found.bytes_after

    def _constant(self, name: str, number: int) -> ir.Value:
        return weights.new_constant(self.graph, name, np.array([number], np.int64))

    def _tensors(self, weight: ir.Value, in_by_out: bool) -> tuple[ir.Value, ir.Value, ir.Value | None]:
        """B, scales and zero points of a weight, the same ones for everything that reads it."""
        key = id(weight), in_by_out
        if key not in self.tensors:
            found = self._quantized(weight, in_by_out)
            dtype = weight.dtype or ir.DataType.FLOAT
            packed = weights.new_constant(self.graph, f"{weight.name}.int{self.settings.bits}", found.packed)
            scales = weights.new_constant(self.graph, f"{weight.name}.scales", found.scales.astype(dtype.numpy()))
            points = found.zero_points
            zeros = None if points is None else weights.new_constant(self.graph, f"{weight.name}.zero_points", points)
            self.tensors[key] = packed, scales, zeros
            self.done.bytes_before += weights.nbytes(weight)
            self.done.bytes_after += sum(
                weights.nbytes(value) for value in (packed, scales, zeros) if value is not None
            )
        return self.tensors[key]

    def _quantized(self, weight: ir.Value, in_by_out: bool) -> QuantizedWeight:
        names, settings = weights.parts(weight), self.settings
        values = weights.matrix(weight).astype(np.float32)
        channels = np.ascontiguousarray(values.T if in_by_out else values)  # (out, in)
        found, start = [], 0
        for name, size in zip(names, weights.part_sizes(weight, len(channels)), strict=True):
            part = settings.calibrated.get(layer_name(name))
            self.done.calibrated += part is not None
            if part is None:
                rows = channels[start : start + size]
                part = round_to_nearest(rows, settings.bits, settings.block_size, settings.symmetric)
            if settings.half_scales:
                part = replace(part, scales=_in_half(part.scales))
            if weight.dtype not in (None, ir.DataType.FLOAT):  # the scales as the file has them
                part = replace(part, scales=part.scales.astype(weight.dtype.numpy()).astype(np.float32))
            self.done.weights[name] = part
            found.append(part)
            start += size
        return _concatenated(found)


def quantize(model: ir.Model, settings: Quantization) -> Quantized:
    """Quantize every large matrix of the backbone. Raises TraceError if the lm_head was not among them: a quantizer
    that passes over it leaves most of a small model's bytes."""
    quantizer = _Quantizer(model, settings)
    nodes = list(model.graph)
    for node in nodes:
        if _multiplies_a_weight(node) and not _chooses_experts(node):
            quantizer.matmul(node)
        elif _looks_up(node):
            quantizer.gather(node)
        elif settings.experts and node.op_type == "MoE":
            quantizer.experts(node)
    weights.drop_unused(model.graph, quantizer.gone)
    done = quantizer.done
    made = {id(value) for tensors in quantizer.tensors.values() for value in tensors}  # their scales are in float
    made |= {id(value) for value in quantizer.made}
    for value in model.graph.initializers.values():
        large = _large_and_floating(value) and id(value) not in made
        if large and weights.is_backbone(value) and not _is_table(value):
            done.kept[str(value.name)] = weights.nbytes(value)
    if not _head_is_quantized(model):
        raise TraceError("the lm_head was not quantized: its product has a form that the quantizer does not know")
    return done


def use_int8_compute(model: ir.Model) -> int:
    """Let the products with quantized weights round their activations to int8, which is what processors are fast at;
    returns how many."""
    nodes = [node for node in model.graph if node.op_type == "MatMulNBits"]
    for node in nodes:
        node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", INT8_COMPUTE)
    return len(nodes)


def _multiplies_a_weight(node: ir.Node) -> bool:
    if node.op_type not in ("MatMul", "FusedMatMul", "Gemm") or not weights.constant_matrix(node.inputs[1]):
        return False
    weight = node.inputs[1]
    assert weight is not None
    if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
        outputs = weights.matrix(weight).shape[0 if node.attributes.get_int("transB", 0) else 1]
        if list(node.inputs[2].shape or []) != [outputs]:
            return False
    plain = all(node.attributes.get_int(name, 0) == 0 for name in ("transA", "transBatchA", "transBatchB"))
    scaled = any(node.attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta"))
    return plain and not scaled and weights.is_backbone(weight) and weights.matrix(weight).size >= SMALLEST


def _chooses_experts(node: ir.Node) -> bool:
    """Whether the largest values of a product are picked, before anything else is multiplied with a weight."""
    pending, seen = [node], {node}
    while pending:
        for user in pending.pop().successors():
            if user.op_type == "TopK":
                return True
            if user.op_type not in PRODUCTS and user not in seen:
                seen.add(user)
                pending.append(user)
    return False


def _looks_up(node: ir.Node) -> bool:
    """Whether the node reads rows of the tokens' embeddings."""
    if node.op_type != "Gather" or not weights.constant_matrix(node.inputs[0]) or node.inputs[1] is None:
        return False
    weight = node.inputs[0]
    assert weight is not None
    floating = weight.dtype is not None and weight.dtype.is_floating_point()
    tokens = node.inputs[1].name == "input_ids"
    return tokens and floating and weights.is_backbone(weight) and node.attributes.get_int("axis", 0) == 0


def _with_bias(node: ir.Node) -> tuple[ir.Value, ir.Value | None]:
    """(the sum, the bias) where a constant vector is added to a product and nothing else reads it; else (product,
    None)."""
    product = node.outputs[0]
    uses = list(product.uses())
    if len(uses) == 1 and uses[0][0].op_type == "Add" and not product.is_graph_output():
        add, place = uses[0]
        other = add.inputs[1 - place]
        if other is not None and other.is_initializer() and other.const_value is not None:
            shape = other.const_value.shape
            if len(shape) == 1 and shape[0] != 1 and weights.is_backbone(other):
                return add.outputs[0], other
    return product, None


def _large_and_floating(value: ir.Value) -> bool:
    constant = value.const_value
    if constant is None or value.dtype is None or not value.dtype.is_floating_point():
        return False
    return len(constant.shape) > 1 and constant.size >= SMALLEST


def _is_table(value: ir.Value) -> bool:
    """Rotary tables and position embeddings: read by rows, a few bytes a step."""
    return all(node.op_type in ("GroupQueryAttention", "RotaryEmbedding", "Gather") for node, _ in value.uses())


def _head_is_quantized(model: ir.Model) -> bool:
    """Whether a MatMulNBits node is behind the logits, past scales and caps."""
    pending = [value for value in model.graph.outputs if value.name == "logits"]
    while pending:
        node = pending.pop().producer()
        if node is None:
            continue
        if node.op_type == "MatMulNBits":
            return True
        if node.op_type in ("MatMul", "FusedMatMul", "Gemm"):
            return False
        pending += [value for value in node.inputs if value is not None]
    return False


def _in_half(scales: weights.Array) -> weights.Array:
    half = in_half(scales)
    return half if np.allclose(half, scales, rtol=1e-3, atol=0) else scales


def _concatenated(found: list[QuantizedWeight]) -> QuantizedWeight:
    points = [weight.zero_points for weight in found if weight.zero_points is not None]
    return QuantizedWeight(
        np.concatenate([weight.packed for weight in found]),
        np.concatenate([weight.scales for weight in found]),
        np.concatenate(points) if points else None,
        found[0].bits,
    )
