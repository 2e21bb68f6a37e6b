"""RMS norms, and RMS norms of a residual sum, as onnxruntime's single nodes. The rewrites are onnxscript's."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript.rewriter.ort_fusions.rms_normalization import fuse_rms_normalization
from onnxscript.rewriter.ort_fusions.skip_normalization import fuse_skip_rms_normalization


def fuse_rms_norm(model: ir.Model) -> int:
    """Pow, ReduceMean, Add, Sqrt, Reciprocal, Mul, Mul -> SimplifiedLayerNormalization."""
    return int(fuse_rms_normalization(model))


def fuse_skip_rms_norm(model: ir.Model) -> int:
    """Add, SimplifiedLayerNormalization -> SkipSimplifiedLayerNormalization, which also returns the sum."""
    return int(fuse_skip_rms_normalization(model))
