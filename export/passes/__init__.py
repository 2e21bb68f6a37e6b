"""Graph passes: one rewrite per file, run in one order, each returning how often it fired.

A pass changes the graph in place and computes exactly what it replaces.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from ..errors import TraceError
from . import (
    attention_operator,
    clean,
    fold_layout,
    half_adapter,
    low_rank,
    name_dimensions,
    norms,
    pack_qkv,
    quantized_matmul,
    quantized_swiglu,
    reshapes,
    silu,
    weight_layout,
)
from .quantize import Quantization, Quantized, quantize, use_int8_compute
from .quantize_experts import finish_experts

Pass = Callable[[ir.Model], int]

PASSES: tuple[tuple[str, Pass], ...] = (
    ("fuse_rms_norm", norms.fuse_rms_norm),
    ("fuse_skip_rms_norm", norms.fuse_skip_rms_norm),
    ("merge_reshapes", reshapes.merge_reshapes),
    ("fold_layout", fold_layout.fold_layout),
    ("lay_out_weights", weight_layout.lay_out_weights),
    ("pack_low_rank", low_rank.pack_low_rank),
    ("pack_qkv", pack_qkv.pack_qkv),
    ("fuse_silu", silu.fuse_silu),
    ("use_own_attention", attention_operator.use_own_attention),
)
CLEANING: tuple[tuple[str, Pass], ...] = (
    ("drop_unused_inputs", clean.drop_unused_inputs),
    ("name_dimensions", name_dimensions.name_dimensions),
    ("strip_metadata", clean.strip_metadata),
)


def run_passes(model: ir.Model, quantization: Quantization | None = None) -> tuple[dict[str, int], Quantized | None]:
    """Run every pass in order, and the quantizer before the cleaning; returns the counts and what was quantized.

    Raises TraceError if a weight is left in PyTorch's layout, which would make onnxruntime transpose it at every start.
    """
    counts = {name: rewrite(model) for name, rewrite in PASSES}
    left = [node.name for node in model.graph if weight_layout.transposes_a_weight(node)]
    if left:
        raise TraceError(f"{len(left)} weights are still transposed in the graph, the first by {left[0]}")
    quantized = None if quantization is None else quantize(model, quantization)
    if quantized is not None:
        counts["quantize"] = quantized.matrices + quantized.embeddings + quantized.experts
    return counts | {name: rewrite(model) for name, rewrite in CLEANING}, quantized


FINISHING: tuple[tuple[str, Pass], ...] = (
    ("int8_compute", lambda model: use_int8_compute(model) + finish_experts(model)),
    ("store_adapter_in_half", half_adapter.store_adapter_in_half),
)
OWN_OPERATORS: tuple[tuple[str, Pass], ...] = (
    ("fuse_quantized_matmul", quantized_matmul.fuse_quantized_matmul),
    ("fuse_quantized_swiglu", quantized_swiglu.fuse_quantized_swiglu),
)


def finish_quantized(model: ir.Model, own_operators: bool = True) -> dict[str, int]:
    """What makes a quantized graph fast and small at the price of rounding, after it was verified; returns counts.
    own_operators: whether products may become functions of the graph, which not every execution provider knows."""
    return {name: rewrite(model) for name, rewrite in (*FINISHING, *(OWN_OPERATORS if own_operators else ()))}
