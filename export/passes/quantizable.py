"""Which nodes the quantizer takes, and why not: products, lookups and experts with weights of the backbone."""

from __future__ import annotations

import onnx_ir as ir

from . import weights
from .graph import operand
from .rewrite import Declined

PRODUCTS = ("MatMul", "FusedMatMul", "Gemm", "MatMulNBits", "MoE", "QMoE", "GroupQueryAttention")
SMALLEST = 1024  # elements; smaller matrices are not worth a quantized node
SMALL = Declined(f"the weight has fewer than {SMALLEST} elements")
TRANSPOSED_OR_SCALED = Declined("the product is scaled, or its input is transposed")
OTHER_BIAS = Declined("the bias is not one number per output")
ROUTER = Declined("it chooses experts")


def multiplies_a_weight(node: ir.Node) -> bool:
    """Whether the node is a product with a matrix of the backbone."""
    if node.op_type not in ("MatMul", "FusedMatMul", "Gemm"):
        return False
    weight = node.inputs[1]
    return weight is not None and weights.constant_matrix(weight) and weights.is_backbone(weight)


def looks_up(node: ir.Node) -> bool:
    """Whether the node reads rows of the tokens' embeddings."""
    if node.op_type != "Gather" or not weights.constant_matrix(node.inputs[0]) or node.inputs[1] is None:
        return False
    weight = node.inputs[0]
    assert weight is not None
    floating = weight.dtype is not None and weight.dtype.is_floating_point()
    tokens = node.inputs[1].name == "input_ids"
    return tokens and floating and weights.is_backbone(weight) and node.attributes.get_int("axis", 0) == 0


def why_not(product: ir.Node) -> Declined | None:
    """Why a product with a matrix of the backbone stays; None: it does not."""
    weight = product.inputs[1]
    assert weight is not None
    shape = weights.matrix(weight).shape
    if weights.matrix(weight).size < SMALLEST:
        return SMALL
    if any(product.attributes.get_int(name, 0) for name in ("transA", "transBatchA", "transBatchB")) or any(
        product.attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta")
    ):
        return TRANSPOSED_OR_SCALED
    bias = operand(product, 2) if product.op_type == "Gemm" else None
    if bias is not None and list(bias.shape or []) != [shape[0 if product.attributes.get_int("transB", 0) else 1]]:
        return OTHER_BIAS
    return ROUTER if _chooses_experts(product) else None


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


def is_large(value: ir.Value) -> bool:
    """Whether a weight is a matrix, or several, worth quantizing."""
    constant = value.const_value
    if constant is None or value.dtype is None or not value.dtype.is_floating_point():
        return False
    return len(constant.shape) > 1 and constant.size >= SMALLEST


def is_table(value: ir.Value) -> bool:
    """Rotary tables and position embeddings: read by rows, a few bytes a step."""
    return all(node.op_type in ("GroupQueryAttention", "RotaryEmbedding", "Gather") for node, _ in value.uses())


def head_is_quantized(model: ir.Model) -> str | None:
    """What is wrong where no MatMulNBits node is behind the logits, past scales and caps: a quantizer that skips the
    lm_head leaves most of a small model's bytes."""
    pending = [value for value in model.graph.outputs if value.name == "logits"]
    while pending:
        node = pending.pop().producer()
        if node is None:
            continue
        if node.op_type == "MatMulNBits":
            return None
        if node.op_type in ("MatMul", "FusedMatMul", "Gemm"):
            break
        pending += [value for value in node.inputs if value is not None]
    return "the lm_head was not quantized: its product has a form that the quantizer does not know"
