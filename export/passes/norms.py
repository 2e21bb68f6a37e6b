"""RMS norms, and RMS norms of a residual sum, as onnxruntime's single nodes. The rewrites are onnxscript's."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern
from onnxscript.rewriter.ort_fusions.rms_normalization import fuse_rms_normalization
from onnxscript.rewriter.ort_fusions.skip_normalization import SkipRmsNormFusion

from .rewrite import Sweep


class _OfOneType(SkipRmsNormFusion):  # type: ignore[misc]
    """The node has one type for all that it reads, and half-precision norms may scale in float32."""

    def check(self, op: Any, input: ir.Value, skip: ir.Value, gamma: ir.Value, **others: Any) -> pattern.MatchResult:
        if gamma.dtype != input.dtype:
            return pattern.MatchResult().fail("The scale has another type.", gamma)
        return super().check(op, input, skip, gamma, **others)


_skip_rules = pattern.RewriteRuleSet(
    [
        _OfOneType.rule("SkipRmsNormPreBias", has_bias=True, bias_pre_add=True),
        _OfOneType.rule("SkipRmsNormBias", has_bias=True),
        _OfOneType.rule("SkipRmsNorm"),
    ]
)

fuse_rms_norm = Sweep(
    "fuse_rms_norm",
    "Pow, ReduceMean, Add, Sqrt, Reciprocal, Mul, Mul -> SimplifiedLayerNormalization",
    lambda model: int(fuse_rms_normalization(model)),
)
fuse_skip_rms_norm = Sweep(
    "fuse_skip_rms_norm",
    "Add, SimplifiedLayerNormalization -> SkipSimplifiedLayerNormalization, which also returns the sum",
    lambda model: int(_skip_rules.apply_to_model(model)),
)
