"""What the export's own check says of rounding and of faults."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from export.errors import VerificationError
from export.report import report_parity
from export.verification.parity import (
    Failure,
    ParityReport,
    _in_float64,
    _judge_failures,
    expected_outputs,
    verify_graph,
)
from tests.builders import CONTEXT
from tests.exported import PROMPT, Exported, copied


def judge(tiny: Exported, difference: float) -> ParityReport:
    """A report with one difference past its limit, judged."""
    report = ParityReport(1e-4, failures=[Failure("decode", "logits", difference, 1e-9)])
    with torch.no_grad():
        expected = [expected_outputs(tiny.model, PROMPT, 5, ("base", "adapter"))]
        _judge_failures(report, tiny.model, [PROMPT], [5], ("base", "adapter"), expected)
    return report


def test_a_difference_within_pytorchs_own_rounding_is_not_the_graphs_fault(tiny: Exported) -> None:
    report = judge(tiny, 1e-7)
    assert 1e-8 < report.rounding["logits"] < 1e-4
    assert report.as_dict()["pytorch_rounding"] == report.rounding


@pytest.mark.parametrize("difference", [1e-3, float("nan")])
def test_a_larger_difference_is_the_graphs_fault(tiny: Exported, difference: float) -> None:
    with pytest.raises(VerificationError, match="logits in decode is off by"):
        judge(tiny, difference)


def test_float64_leaves_the_model_as_it_was(tiny: Exported) -> None:
    before = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}
    with _in_float64(tiny.model):
        assert next(tiny.model.parameters()).dtype == torch.float64
    for name, tensor in tiny.model.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), before[name].numpy())
        assert tensor.dtype == before[name].dtype


def test_rounded_arithmetic_may_be_off_in_places_but_not_everywhere() -> None:
    expected = np.random.default_rng(0).standard_normal((4, 50)).astype(np.float32)
    other = np.random.default_rng(1).standard_normal((4, 50)).astype(np.float32)
    spiked = expected.copy()
    spiked[0, 0] += 3  # sharp attention
    spiked[1] = other[1]  # another expert
    report = ParityReport(1e-4, rounded=True)
    report.compare("prefill", "logits", spiked, expected)
    report.judge_positions()
    assert report.failures == []
    assert report.differences["prefill"]["logits"] == np.abs(spiked - expected).max()
    for row in range(4):  # another tensor: as decode steps come
        report.compare("decode", "logits", other[row], expected[row])
    report.judge_positions()
    assert [failure.name for failure in report.failures] == ["logits"]
    assert report.failures[0].difference > 1
    strict = ParityReport(1e-4)
    strict.compare("decode", "logits", spiked, expected)
    strict.judge_positions()
    assert len(strict.failures) == 1


def test_of_a_rounded_graph_what_is_judged_is_shown() -> None:
    expected = np.random.default_rng(0).standard_normal((9, 50)).astype(np.float32)
    found = expected * np.float32(1.03)
    found[0, 0] += 29
    exact, rounded = ParityReport(1e-4), ParityReport(1e-4, rounded=True)
    exact.compare("prefill", "logits", expected, expected)
    rounded.compare("prefill", "logits", found, expected)
    rounded.judge_positions()
    exact.add(rounded, ", finished")
    lines: list[str] = []
    report_parity(exact, lines.append)
    assert lines[:2] == [
        "verify    prefill: largest difference from PyTorch: logits 0.0e+00",
        "verify    prefill, finished: rounding changes the middle position by logits 3.0% (limit 50%)",
    ]
    assert exact.as_dict()["middle_change"]["prefill, finished"]["logits"] == pytest.approx(0.03, rel=1e-3)
    assert exact.as_dict()["max_abs_difference"]["prefill, finished"]["logits"] > 28


def test_with_an_infinite_tolerance_only_what_is_not_a_number_fails() -> None:
    expected, other = np.random.default_rng(0).standard_normal((2, 9, 50)).astype(np.float32)
    report = ParityReport(np.inf, rounded=True)
    report.compare("prefill", "logits", other, expected)
    report.judge_positions()
    assert report.changes["prefill"]["logits"] > 1
    assert report.failures == []
    report.compare("decode", "logits", other * np.float32("nan"), expected)
    report.judge_positions()
    assert len(report.failures) == 1


def test_rounded_arithmetic_that_is_not_a_number_fails() -> None:
    expected = np.ones((5, 3), np.float32)
    found = expected.copy()
    found[0, 0] = np.nan
    report = ParityReport(1e-4, rounded=True)
    report.compare("prefill", "logits", found, expected)
    report.judge_positions()
    assert len(report.failures) == 1


@pytest.mark.parametrize("wrong", [{1: 2, 2: 1}, {2: 3}])
def test_a_graph_that_takes_another_memory_is_refused(tiny: Exported, tmp_path: Path, wrong: dict[int, int]) -> None:
    """Its `memory` is compared with other numbers than it is said to be."""
    artifact = copied(tiny.artifact, tmp_path / "artifact")
    proto = onnx.load(str(artifact / "model.onnx"), load_external_data=False)
    made = {output: node for node in proto.graph.node for output in node.output}
    compared = [node for node in proto.graph.node if node.op_type == "Equal"]
    assert len(compared) == 2
    for node in compared:
        assert made[node.input[0]].input[0] == "memory"
        (number,) = [tensor for tensor in proto.graph.initializer if tensor.name == node.input[1]]
        value = int(numpy_helper.to_array(number))
        other = numpy_helper.from_array(np.array(wrong.get(value, value)), f"{number.name}_{value}")
        proto.graph.initializer.append(other)
        node.input[1] = other.name
    onnx.save(proto, str(artifact / "model.onnx"))
    with pytest.raises(VerificationError, match=r"logits_(base|adapter) in one memory is off"):
        verify_graph(artifact, tiny.model, ("base", "adapter"), CONTEXT)
