"""Products with quantized weights round their activations to int8, which processors are fast at."""

from __future__ import annotations

import onnx_ir as ir

from .graph import nodes_of
from .quantize_experts import INT8_COMPUTE, finish_experts
from .rewrite import Sweep


def _compute_in_int8(model: ir.Model) -> int:
    """Counts nodes."""
    nodes = list(nodes_of(model, "MatMulNBits"))
    for node in nodes:
        node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", INT8_COMPUTE)
    return len(nodes) + finish_experts(model)


int8_compute = Sweep("int8_compute", "MatMulNBits, QMoE in floating point -> the same in int8", _compute_in_int8)
