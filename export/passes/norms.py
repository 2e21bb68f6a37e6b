"""RMS norms, and RMS norms of a residual sum, as onnxruntime's single nodes. The rewrites are onnxscript's."""

from __future__ import annotations

from typing import Any

from onnxscript.rewriter import pattern
from onnxscript.rewriter.ort_fusions.rms_normalization import fuse_rms_normalization
from onnxscript.rewriter.ort_fusions.skip_normalization import SkipRmsNormFusion

from .rewrite import Sweep


class _OfOneType(SkipRmsNormFusion):
    """The node has one type for all that it reads, and half-precision norms may scale in float32."""

    def check(self, op: Any, input: Any, skip: Any, gamma: Any, *others: Any, **named: Any) -> Any:
        if gamma.dtype != input.dtype:
            return pattern.MatchResult().fail("The scale has another type.", gamma)
        return super().check(op, input, skip, gamma, *others, **named)


_rule: Any = _OfOneType.rule
_skip_rules = pattern.RewriteRuleSet(
    [
        _rule("SkipRmsNormPreBias", has_bias=True, bias_pre_add=True),
        _rule("SkipRmsNormBias", has_bias=True),
        _rule("SkipRmsNorm"),
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
