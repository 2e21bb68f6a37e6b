"""Graph passes: one rewrite per file, run in one order, each saying how often it fired and why it did not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import onnx_ir as ir

from ..errors import TraceError
from .attention_operator import use_own_attention
from .clean import drop_unused_inputs, strip_metadata
from .fold_layout import fold_layout
from .half_adapter import store_adapter_in_half
from .int8_compute import int8_compute
from .low_rank import pack_low_rank
from .name_dimensions import name_dimensions
from .norms import fuse_rms_norm, fuse_skip_rms_norm
from .pack_codes import pack_codes
from .pack_products import pack_products
from .pack_qkv import pack_qkv
from .quantizable import head_is_quantized
from .quantization import Quantization, Quantized
from .quantize import Quantizer
from .quantized_matmul import fuse_quantized_matmul
from .quantized_swiglu import fuse_quantized_swiglu
from .reshapes import merge_reshapes
from .rewrite import Outcome, Pass
from .silu import fuse_silu
from .weight_layout import lay_out_weights, weights_are_laid_out
from .widen import widen_without_kernel


class Stage(Enum):
    """When a pass runs. What comes after verification makes a quantized graph fast and small at the price of rounding;
    own operators are functions of the graph, which not every execution provider knows."""

    BEFORE_QUANTIZATION = "before quantization"
    QUANTIZATION = "quantization"
    CLEANING = "cleaning"
    AFTER_VERIFICATION = "after verification"
    OWN_OPERATORS = "own operators"


@dataclass(frozen=True)
class Step:
    """A pass in its place. must_fire: whether firing zero times is an error. problem: what is wrong with the graph
    after the pass, None where nothing is."""

    stage: Stage
    apply: Pass
    must_fire: bool = False
    problem: Callable[[ir.Model], str | None] = lambda model: None

    def __call__(self, model: ir.Model) -> Outcome:
        """Run the pass. Raises TraceError if it did not do what it must."""
        outcome = self.apply(model)
        problem = self.problem(model)
        if problem is None and self.must_fire and not outcome.fired:
            problem = f"the pass {self.apply.name} found nothing to do"
        if problem is not None:
            raise TraceError(problem)
        return outcome


def ordered_passes(quantizer: Quantizer | None = None) -> tuple[Step, ...]:
    """Every pass, in the order in which they run; without a quantizer, those of a graph that stays in floating
    point."""
    steps = (
        Step(Stage.BEFORE_QUANTIZATION, fuse_rms_norm),
        Step(Stage.BEFORE_QUANTIZATION, fuse_skip_rms_norm),
        Step(Stage.BEFORE_QUANTIZATION, merge_reshapes),
        Step(Stage.BEFORE_QUANTIZATION, fold_layout),
        Step(Stage.BEFORE_QUANTIZATION, lay_out_weights, problem=weights_are_laid_out),
        Step(Stage.BEFORE_QUANTIZATION, pack_low_rank),
        Step(Stage.BEFORE_QUANTIZATION, pack_qkv),
        Step(Stage.BEFORE_QUANTIZATION, fuse_silu),
        Step(Stage.BEFORE_QUANTIZATION, pack_products),
        Step(Stage.BEFORE_QUANTIZATION, use_own_attention),
        None if quantizer is None else Step(Stage.QUANTIZATION, quantizer, problem=head_is_quantized),
        Step(Stage.CLEANING, widen_without_kernel),
        Step(Stage.CLEANING, drop_unused_inputs),
        Step(Stage.CLEANING, name_dimensions),
        Step(Stage.CLEANING, strip_metadata),
        Step(Stage.AFTER_VERIFICATION, int8_compute, must_fire=True),
        Step(Stage.AFTER_VERIFICATION, store_adapter_in_half),
        Step(Stage.OWN_OPERATORS, fuse_quantized_matmul),
        Step(Stage.OWN_OPERATORS, pack_codes),
        Step(Stage.OWN_OPERATORS, fuse_quantized_swiglu),
    )
    return tuple(step for step in steps if step is not None)


def run_passes(
    model: ir.Model, quantization: Quantization | None = None
) -> tuple[dict[str, Outcome], Quantized | None]:
    """Turn a trace into the graph that is verified; returns the outcomes by the passes' names, and what was quantized.

    Raises TraceError if a weight is left in PyTorch's layout or the lm_head in floating point.
    """
    quantizer = None if quantization is None else Quantizer(quantization)
    steps = ordered_passes(quantizer)
    outcomes = _run(model, steps, {Stage.BEFORE_QUANTIZATION, Stage.QUANTIZATION, Stage.CLEANING})
    return outcomes, None if quantizer is None else quantizer.done


def finish_quantized(model: ir.Model, own_operators: bool = True) -> dict[str, Outcome]:
    """Run what comes after the verification of a quantized graph; returns the outcomes by the passes' names.
    own_operators: whether products may become functions of the graph."""
    stages = {Stage.AFTER_VERIFICATION} | ({Stage.OWN_OPERATORS} if own_operators else set())
    return _run(model, ordered_passes(), stages)


def _run(model: ir.Model, steps: tuple[Step, ...], stages: set[Stage]) -> dict[str, Outcome]:
    return {step.apply.name: step(model) for step in steps if step.stage in stages}
