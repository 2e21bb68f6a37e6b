"""Every gate kind, exported, against the uncached PyTorch oracle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from imsm_core.gates import GATES
from imsm_core.reference import reference_generate
from runtime import Session
from tests.exported import PROMPT, Exported, export_tiny
from tests.measured import check_each_memory, check_memories_apart


@pytest.mark.parametrize("kind", [kind for kind in GATES if kind != "query_aware"])
def test_exported_gate_equals_the_oracle_at_several_biases_and_is_measured_by_memory(kind: str, tmp_path: Path) -> None:
    exported = export_tiny(tmp_path, gate_kind=kind)
    session = Session(exported.artifact)
    for bias in (0.0, 1.5, -40.0):
        state = session.new_state(1, memory_bias=bias)
        output = session.prefill(state, [PROMPT])
        for step in reference_generate(exported.model, PROMPT, 6, memory_bias=bias):
            np.testing.assert_allclose(output.logits[0], step.logits.numpy(), atol=1e-4, rtol=1e-4)
            assert output.gate_mean is not None
            np.testing.assert_allclose(output.gate_mean[0], step.gate.mean(), atol=1e-4)
            output = session.decode_step(state, [step.token])
    steps = reference_generate(exported.model, PROMPT, 6)
    state = session.new_state()
    session.prefill(state, [PROMPT])
    outputs = session.continue_step(state, [step.token for step in steps[:-1]])
    for index, step in enumerate(steps[1:]):
        np.testing.assert_allclose(outputs.logits[index], step.logits.numpy(), atol=1e-4, rtol=1e-4)
    check_memories_apart(exported)
    check_each_memory(exported)


def test_the_quality_of_each_memory_of_the_default_gate_is_its_own(tiny: Exported) -> None:
    check_memories_apart(tiny)
    check_each_memory(tiny)
