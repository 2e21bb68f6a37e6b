"""RMS norms, and RMS norms of a residual sum, as onnxruntime's single nodes. The rewrites are onnxscript's."""

from __future__ import annotations

from onnxscript.rewriter.ort_fusions.rms_normalization import fuse_rms_normalization
from onnxscript.rewriter.ort_fusions.skip_normalization import fuse_skip_rms_normalization

from .rewrite import Sweep

fuse_rms_norm = Sweep(
    "fuse_rms_norm",
    "Pow, ReduceMean, Add, Sqrt, Reciprocal, Mul, Mul -> SimplifiedLayerNormalization",
    lambda model: int(fuse_rms_normalization(model)),
)
fuse_skip_rms_norm = Sweep(
    "fuse_skip_rms_norm",
    "Add, SimplifiedLayerNormalization -> SkipSimplifiedLayerNormalization, which also returns the sum",
    lambda model: int(fuse_skip_rms_normalization(model)),
)
