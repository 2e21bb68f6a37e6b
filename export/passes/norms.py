"""RMS norms, and RMS norms of a residual sum, as onnxruntime's single nodes. The rewrites are onnxscript's."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript.rewriter.ort_fusions.rms_normalization import fuse_rms_normalization
from onnxscript.rewriter.ort_fusions.skip_normalization import fuse_skip_rms_normalization

from .rewrite import Sweep


def _fuse(model: ir.Model) -> int:
    """The fusion leaves out a Cast of the input. Where the weight is of another type than the input, as in half
    precision where a norm computes 1 + weight in float32, few kernels take the two: the Cast is put back."""
    count = int(fuse_rms_normalization(model))
    for node in list(model.graph):
        if node.op_type != "SimplifiedLayerNormalization":
            continue
        x, scale = node.inputs[:2]
        assert x is not None
        assert scale is not None
        if scale.dtype is not None and x.dtype != scale.dtype:
            cast = ir.node("Cast", [x], {"to": int(scale.dtype)})
            cast.outputs[0].dtype, cast.outputs[0].shape = scale.dtype, x.shape
            model.graph.insert_before(node, cast)
            node.replace_input_with(0, cast.outputs[0])
    return count


fuse_rms_norm = Sweep(
    "fuse_rms_norm",
    "Pow, ReduceMean, Add, Sqrt, Reciprocal, Mul, Mul -> SimplifiedLayerNormalization",
    _fuse,
)
fuse_skip_rms_norm = Sweep(
    "fuse_skip_rms_norm",
    "Add, SimplifiedLayerNormalization -> SkipSimplifiedLayerNormalization, which also returns the sum",
    lambda model: int(fuse_skip_rms_normalization(model)),
)
