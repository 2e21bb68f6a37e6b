"""Prompt methods: an adapter stream that is longer than the base stream, from the oracle to the runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imsm_core.reference import reference_generate, reference_step
from runtime import Session
from runtime.errors import ArtifactError, PromptError
from tests.adapters import VIRTUAL_TOKENS
from tests.exported import PROMPT, Exported, copied, edit_manifest, export_tiny

ATOL = RTOL = 1e-4

# Between them: a learned cache, whose keys were never rotated, and embeddings that run through the layers; rotation
# inside attention, rotation by nodes, and learned positions.
MODELS: dict[str, dict[str, Any]] = {
    "prefix tuning, rotation inside attention": {"adapter": "prefix_tuning", "head_dim": 16},
    "prompt tuning, rotation by nodes": {"adapter": "prompt_tuning", "head_dim": 12},
    "p-tuning, learned positions": {"adapter": "p_tuning", "kind": "gpt2", "head_dim": 12},
}


@pytest.fixture(scope="module", params=MODELS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_tiny(tmp_path_factory.mktemp("virtual"), **MODELS[request.param])


def test_a_ragged_batch_decodes_like_the_uncached_oracle(exported: Exported) -> None:
    prompts = [PROMPT, PROMPT[3:7], [9]]
    expected = [reference_generate(exported.model, prompt, 12) for prompt in prompts]
    session = Session(exported.artifact)
    state = session.new_state(len(prompts))
    output = session.prefill(state, prompts)
    for steps in zip(*expected, strict=True):
        for row, step in enumerate(steps):
            np.testing.assert_allclose(output.logits[row], step.logits.numpy(), atol=ATOL, rtol=RTOL)
            assert output.gate_mean is not None
            np.testing.assert_allclose(output.gate_mean[row], step.gate.mean(), atol=ATOL)
        output = session.decode_step(state, [step.token for step in steps])


def test_chunks_and_a_continued_conversation_equal_a_fresh_run(exported: Exported) -> None:
    session = Session(exported.artifact)
    state = session.new_state(1)
    session.prefill(state, [PROMPT[:5]], chunk=2)
    session.decode_step(state, [40])
    output = session.prefill(state, [PROMPT[5:]], chunk=4)
    whole = [*PROMPT[:5], 40, *PROMPT[5:]]
    expected = reference_step(exported.model, whole, len(whole))
    np.testing.assert_allclose(output.logits[0], expected.logits.numpy(), atol=ATOL, rtol=RTOL)


def test_the_query_mean_and_the_lengths_leave_virtual_tokens_out(exported: Exported) -> None:
    session = Session(exported.artifact)
    state = session.new_state(1)
    session.prefill(state, [PROMPT])
    assert state.query_count[0] == state.lengths[0] == len(PROMPT)


def test_the_manifest_counts_them_and_the_context_is_shorter(exported: Exported) -> None:
    assert exported.manifest["virtual_tokens"] == {"base": 0, "adapter": VIRTUAL_TOKENS}
    assert exported.manifest["model"]["context_length"] == 128 - VIRTUAL_TOKENS
    assert exported.manifest["shared_layers"] == 0
    assert {tuple(layer["groups"]) for layer in exported.manifest["cache"]} == {("both",)}
    assert exported.manifest["adapter"]["layers"] == []
    assert exported.manifest["adapter"]["bytes"] > 0
    session = Session(exported.artifact)
    state = session.new_state(1)
    long = (PROMPT * 12)[: 128 - VIRTUAL_TOKENS]
    session.prefill(state, [long])
    with pytest.raises(PromptError, match="has reached the model's context of 125 tokens"):
        session.decode_step(state, [5])


def test_a_cache_that_grows_keeps_its_virtual_tokens(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.engine.cache.BLOCK", 4)
    session = Session(exported.artifact)
    state = session.new_state(1)
    output = session.prefill(state, [PROMPT])
    for step in reference_generate(exported.model, PROMPT, 9):
        np.testing.assert_allclose(output.logits[0], step.logits.numpy(), atol=ATOL, rtol=RTOL)
        output = session.decode_step(state, [step.token])
    assert state.caches["both"].capacity >= len(PROMPT) + 9 + VIRTUAL_TOKENS


@pytest.mark.parametrize("content", [b"", b"no archive", None], ids=["empty", "foreign", "other shapes"])
def test_a_damaged_file_of_virtual_tokens_is_one_error(
    exported: Exported, tmp_path: Path, content: bytes | None
) -> None:
    artifact = copied(exported.artifact, tmp_path / "artifact")
    path = artifact / "virtual_tokens.npz"
    if content is None:
        np.savez(path, allow_pickle=False, **{"0.key": np.zeros((1, 2, 3), np.float32)})
    else:
        path.write_bytes(content)
    manifest = json.loads((artifact / "imsm_model.json").read_text())
    edit_manifest(artifact, files=manifest["files"] | {path.name: {"bytes": path.stat().st_size, "sha256": "0" * 64}})
    with pytest.raises(ArtifactError, match=r"virtual_tokens\.npz"):
        Session(artifact)
