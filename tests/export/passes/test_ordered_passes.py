"""The one list of passes: its order and stages, and which of them must do something."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from export.errors import TraceError
from export.passes import Stage, Step, finish_quantized, ordered_passes, run_passes
from export.passes.quantization import Quantization
from export.passes.quantize import Quantizer
from export.passes.rewrite import Sweep
from export.passes.weight_layout import weights_are_laid_out
from tests.graphs import graph, with_weight

STEPS = ordered_passes(Quantizer(Quantization(4)))
NOTHING = Sweep("nothing", "x -> x", lambda model: 0)


def test_passes_have_distinct_names_and_say_what_they_replace() -> None:
    names = [step.apply.name for step in STEPS]
    assert len(set(names)) == len(names)
    assert all("->" in step.apply.pattern for step in STEPS)


def test_the_stages_follow_each_other() -> None:
    order = list(Stage)
    places = [order.index(step.stage) for step in STEPS]
    assert places == sorted(places)
    assert set(places) == set(range(len(order)))


def test_without_a_quantizer_the_other_passes_are_the_same() -> None:
    other = [step.apply for step in STEPS if step.stage is not Stage.QUANTIZATION]
    assert [step.apply for step in ordered_passes()] == other


def test_stages_run_where_they_belong() -> None:
    model = graph("g (float[2, 5, 8] x) => (float[2, 5, 8] logits) { logits = Abs(x) }")
    outcomes, quantized = run_passes(model)
    assert quantized is None
    assert [*outcomes] == [
        step.apply.name for step in ordered_passes() if step.stage in (Stage.BEFORE_QUANTIZATION, Stage.CLEANING)
    ]


def test_only_the_default_form_gets_the_projects_operators() -> None:
    for own, stages in ((True, [Stage.AFTER_VERIFICATION, Stage.OWN_OPERATORS]), (False, [Stage.AFTER_VERIFICATION])):
        constants: dict[str, Any] = {"w": np.zeros((8, 1, 16), np.uint8), "s": np.ones((8, 1), np.float32)}
        model = graph(
            """g (float[5, 32] x, uint8[8, 1, 16] w, float[8, 1] s) => (float[5, 8] logits)
            { logits = com.microsoft.MatMulNBits<K=32, N=8, bits=4, block_size=32>(x, w, s) }"""
        )
        for name, values in constants.items():
            with_weight(model, name, values)
        outcomes: dict[str, Any] = finish_quantized(model, own_operators=own)
        assert [*outcomes] == [step.apply.name for step in STEPS if step.stage in stages]
        assert {node.domain for node in model.graph} == {"imsm" if own else "com.microsoft"}


def test_a_pass_that_must_fire_and_does_not_is_an_error() -> None:
    model = graph("g (float[5, 8] x) => (float[5, 8] y) { y = Abs(x) }")
    with pytest.raises(TraceError, match="int8_compute found nothing to do"):
        finish_quantized(model)


def test_a_pass_that_leaves_a_problem_is_an_error() -> None:
    model = graph("g (float[5, 8] w) => (float[8, 5] y) { y = Transpose(w) }")
    with_weight(model, "w", np.ones((5, 8), np.float32))
    with pytest.raises(TraceError, match="1 weights are still transposed"):
        Step(Stage.BEFORE_QUANTIZATION, NOTHING, problem=weights_are_laid_out)(model)
    required = {step.apply.name for step in STEPS if step.problem(model) is not None}
    assert required == {"lay_out_weights", "quantize"}
