"""The quantizer's settings, and what it reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from ..quantization.weight_format import QuantizedWeight
from . import weights


@dataclass(frozen=True)
class Quantization:
    """bits: 4 or 8. calibrated: weights that were chosen before, by their layer's name in the causal LM; all
    others are rounded to the nearest. experts: whether those are quantized, which needs a recent onnxruntime.
    half_scales: whether scales are rounded to float16 where that changes none of them by a thousandth. rounding: what
    the manifest calls how `calibrated` were made.

    The nodes compute in floating point; `int8_compute` changes that once the file has been verified."""

    bits: int
    block_size: int = 32
    symmetric: bool = True
    calibrated: Mapping[str, QuantizedWeight] = field(default_factory=dict)
    experts: bool = True
    half_scales: bool = False
    rounding: str = "best"


@dataclass
class Quantized:
    """What happened. bytes_before: of the matrices that were quantized. bytes_after: of all that the file has in their
    place, once `count_bytes` was told what is written. kept: matrices of the backbone that stayed in floating point, by
    name, with their bytes. replaced: the graph's names of the matrices; what takes their place has names that begin
    with theirs. weights: what every weight of the traced module became. widths: bits -> how many numbers have so many,
    those of tied weights once. expert_weights: those of its weights that are of experts, all rounded to the
    nearest."""

    matrices: int = 0
    embeddings: int = 0
    experts: int = 0
    calibrated: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    kept: dict[str, int] = field(default_factory=dict)
    replaced: list[str] = field(default_factory=list)
    weights: dict[str, QuantizedWeight] = field(default_factory=dict)
    widths: Counter[int] = field(default_factory=Counter)
    expert_weights: list[str] = field(default_factory=list)

    def count_bytes(self, model: ir.Model) -> None:
        """Set `bytes_after` to what is in the graph, each tensor once."""
        names = tuple(f"{name}." for name in self.replaced)
        self.bytes_after = sum(
            weights.nbytes(value)
            for name, value in model.graph.initializers.items()
            if f"{name}.".startswith(names)
            and weights.is_backbone(value)  # a packed adapter has the name of its layers
        )

    @property
    def mean_bits(self) -> float | None:
        """Of all numbers that were quantized, without their scales; None where nothing was."""
        total = self.widths.total()
        return sum(bits * count for bits, count in self.widths.items()) / total if total else None

    def as_dict(self, settings: Quantization) -> dict[str, Any]:
        """For the manifest."""
        return {
            "bits": settings.bits,
            "block_size": settings.block_size,
            "symmetric": settings.symmetric,
            "rounding": settings.rounding,
            "mean_bits": self.mean_bits,
            "widths": {str(bits): count for bits, count in sorted(self.widths.items())},
            "matrices": self.matrices,
            "embeddings": self.embeddings,
            "experts": self.experts,
            "calibrated": self.calibrated,
            "bytes": self.bytes_after,
            "kept_bytes": sum(self.kept.values()),
        }
