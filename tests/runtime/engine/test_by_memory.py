"""Steps that give the logits of the blend and of each memory alone."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from imsm_core.backbone import apply_head
from runtime import ArtifactError, Session, SettingsError
from runtime.engine.state import StepOutput
from tests.exported import PROMPT, Exported, copied, edit_manifest
from tests.older_formats import as_format

FORCED = 1e4
RAGGED = [PROMPT, PROMPT[:4]]


@pytest.fixture(scope="module")
def session(tiny: Exported) -> Session:
    return Session(tiny.artifact, threads=1)


def forced(session: Session, bias: float) -> tuple[StepOutput, StepOutput]:
    """A prefill and a decode step with every gate at one end."""
    state = session.new_state(2, memory_bias=bias)
    return session.prefill(state, RAGGED), session.decode_step(state, [40, 41])


def test_each_memory_is_what_a_forced_gate_gives_and_the_blend_is_what_it_is_without(session: Session) -> None:
    state, plain = (session.new_state(2, memory_bias=[0.4, -0.2]) for _ in range(2))
    found = session.prefill(state, RAGGED, by_memory=True), session.decode_step(state, [40, 41], by_memory=True)
    blends = session.prefill(plain, RAGGED), session.decode_step(plain, [40, 41])
    for output, blend, base, adapter in zip(
        found, blends, forced(session, FORCED), forced(session, -FORCED), strict=True
    ):
        assert blend.memory_logits is None
        assert output.memory_logits is not None
        assert output.memory_logits.shape == (2, 2, blend.logits.shape[1])
        assert output.memory_logits.dtype == np.float32
        np.testing.assert_array_equal(output.logits, blend.logits)
        np.testing.assert_array_equal(output.gate_mean, blend.gate_mean)
        np.testing.assert_allclose(output.memory_logits[:, 0], base.logits, atol=1e-5)
        np.testing.assert_allclose(output.memory_logits[:, 1], adapter.logits, atol=1e-5)
        assert np.abs(base.logits - adapter.logits).max() > 0.5
    np.testing.assert_array_equal(state.reply_sum, plain.reply_sum)


def test_a_step_is_bound_again_only_when_it_is_asked_for_in_another_form(session: Session) -> None:
    state, plain = session.new_state(1), session.new_state(1)
    for one in (state, plain):
        session.prefill(one, [PROMPT])
        session.reserve(one, 40)
    bindings = []
    for token, by_memory in ((40, False), (41, True), (42, True), (43, False)):
        found = session.decode_step(state, [token], by_memory)
        np.testing.assert_allclose(found.logits, session.decode_step(plain, [token]).logits, atol=1e-6)
        bindings.append(session._bindings[state])
    assert [first is second for first, second in pairwise(bindings)] == [False, True, False]


def test_chunks_and_rows_that_end_apart_have_their_own_memories(session: Session) -> None:
    whole = session.prefill(session.new_state(2), RAGGED, by_memory=True)
    pieces = session.prefill(session.new_state(2), RAGGED, chunk=3, by_memory=True)
    assert whole.memory_logits is not None
    assert pieces.memory_logits is not None
    np.testing.assert_allclose(pieces.memory_logits, whole.memory_logits, atol=1e-4)


def run_last(session: Session, **inputs: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """The graph itself on PROMPT, with outputs at its last token as often as `memory` asks for them."""
    wanted = inputs["memory"].shape
    feed: dict[str, Any] = {
        "input_ids": np.array([PROMPT]),
        "seqlens_k": np.array([len(PROMPT) - 1], np.int32),
        "total_sequence_length": np.array(len(PROMPT), np.int32),
        "query_seqlens": np.array([len(PROMPT)], np.int32),
        "position_ids": np.arange(len(PROMPT))[None],
        "logit_positions": np.full(wanted, len(PROMPT) - 1),
        "query_mask": np.ones((1, len(PROMPT)), np.float32),
        **inputs,
    }
    for value in session.onnx.get_inputs():
        if value.name not in feed:
            batch = 2 if ".both." in value.name else 1
            sizes = [0 if isinstance(size, str) else size for size in value.shape[1:]]
            feed[value.name] = np.zeros((batch, *sizes), np.float32)
    names = [value.name for value in session.onnx.get_outputs()]
    found = session.onnx.run(names, {value.name: feed[value.name] for value in session.onnx.get_inputs()})
    return dict(zip(names, found, strict=True))


def test_every_position_has_its_own_bias_and_memory(session: Session, tiny: Exported) -> None:
    biases = np.array([[0, FORCED, -FORCED, 0, 0, FORCED]], np.float32)
    outputs = run_last(session, memory_bias=biases, memory=np.array([[0, 0, 0, 1, 2, 2]]))
    gates, fused, logits = outputs["gate_mean"][0], outputs["hidden_fused"][0], outputs["logits"][0]
    np.testing.assert_allclose(gates[[1, 2, 5]], [1, 0, 1])
    assert gates[0] == gates[3] == gates[4]  # a memory alone leaves the gate as it is
    base, adapter = outputs["hidden_base"][0], outputs["hidden_adapter"][0]
    np.testing.assert_array_equal(fused[[1, 3]], base[[1, 3]])
    np.testing.assert_array_equal(fused[[2, 4, 5]], adapter[[2, 4, 5]])
    gate = outputs["gate"][0, 0]
    np.testing.assert_allclose(fused[0], gate * base[0] + (1 - gate) * adapter[0], atol=1e-5)
    with torch.no_grad():
        expected = apply_head(tiny.model.causal_lm, torch.from_numpy(fused)[None])[0].numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize("version", [5, 6])
def test_artifacts_of_older_formats_run_and_refuse_it(
    tiny: Exported, session: Session, tmp_path: Path, version: int
) -> None:
    artifact = copied(tiny.artifact, tmp_path / "artifact")
    as_format(version, artifact, tiny.manifest)
    older = Session(artifact, threads=1)
    states = [used.new_state(2, memory_bias=[0.5, -FORCED]) for used in (older, session)]
    outputs = [used.prefill(state, RAGGED) for used, state in zip((older, session), states, strict=True)]
    np.testing.assert_array_equal(outputs[0].logits, outputs[1].logits)
    for state in states:
        state.memory_bias = np.array([FORCED, 0.2], np.float32)
    outputs = [used.decode_step(state, [7, 8]) for used, state in zip((older, session), states, strict=True)]
    np.testing.assert_array_equal(outputs[0].logits, outputs[1].logits)
    assert outputs[0].gate_mean is not None
    assert outputs[0].gate_mean[0] == 1
    line = f"by_memory is True; this artifact is of format {version}, which gives the logits of the blend alone; export"
    with pytest.raises(SettingsError, match=line):
        older.prefill(older.new_state(1), [PROMPT], by_memory=True)
    with pytest.raises(SettingsError, match=line):
        older.decode_step(states[0], [9, 10], by_memory=True)
    assert older.decode_step(states[0], [9, 10]).memory_logits is None
    edit_manifest(artifact, generation={"do_sample": "a key that these formats do not have"})
    assert Session(artifact, threads=1).manifest.generation == {}


def test_a_graph_that_does_not_fit_its_formats_number_is_refused(tiny: Exported, tmp_path: Path) -> None:
    artifact = copied(tiny.artifact, tmp_path / "artifact")
    as_format(6, artifact, tiny.manifest)
    edit_manifest(artifact, format_version=7, generation={"do_sample": False})
    with pytest.raises(ArtifactError, match=r"graph\.inputs\[\d+\] \(memory_bias\) is .*by the rest of the manifest"):
        Session(artifact)
