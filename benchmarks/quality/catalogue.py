"""Which formats are compared: a row each, with the program that runs it and how its model is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Program = Literal["ours", "llama.cpp", "onnxruntime-genai"]
CALIBRATION = "CALIBRATION"
"""Stands in a format's settings for the file of calibration text."""


@dataclass(frozen=True)
class Format:
    """One row. settings: of ours, the fields of ExportSettings; of llama.cpp, `type` as it names file types, and
    `importance` for an importance matrix; of onnxruntime-genai, `algorithm` of its builder."""

    label: str
    program: Program
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def memories(self) -> tuple[str, ...]:
        """What it can be judged in: the gate's blend is ours alone, and genai's graph has no adapter."""
        own: dict[Program, tuple[str, ...]] = {
            "ours": ("base", "adapter", "fused"),
            "llama.cpp": ("base", "adapter"),
            "onnxruntime-genai": ("base",),
        }
        return own[self.program]


def _llama(kind: str, importance: bool = False) -> Format:
    label = f"llama.cpp {kind}, importance matrix" if importance else f"llama.cpp {kind}"
    return Format(label, "llama.cpp", {"type": kind, "importance": importance})


def _genai(algorithm: str) -> Format:
    return Format(f"onnxruntime-genai int4, {algorithm}", "onnxruntime-genai", {"algorithm": algorithm})


FORMATS = {
    "ours-fp32": Format("ours fp32", "ours", {"precision": "fp32"}),
    "ours-int8": Format("ours int8", "ours", {"precision": "int8"}),
    "ours-int4": Format("ours int4", "ours", {"precision": "int4"}),
    "ours-int4-calibrated": Format("ours int4, calibrated", "ours", {"precision": "int4", "calibrate": CALIBRATION}),
    "ours-int4-5.5": Format("ours int4, 5.5 bits", "ours", {"precision": "int4", "mean_bits": 5.5}),
    "ours-int4-nearest": Format("ours int4, nearest", "ours", {"precision": "int4", "rounding": "nearest"}),
    "llama-f16": _llama("F16"),
    "llama-q8_0": _llama("Q8_0"),
    "llama-q6_k": _llama("Q6_K"),
    "llama-q5_k_m": _llama("Q5_K_M"),
    "llama-q4_k_m-imatrix": _llama("Q4_K_M", importance=True),
    "llama-q4_k_m": _llama("Q4_K_M"),
    "llama-q4_0": _llama("Q4_0"),
    "genai-default": _genai("default"),
    "genai-rtn_last": _genai("rtn_last"),
    "genai-k_quant": _genai("k_quant"),
    "genai-k_quant_mixed": _genai("k_quant_mixed"),
}
