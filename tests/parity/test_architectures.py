"""Exported graphs against the uncached PyTorch oracle, by value, for several architectures and shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.attention.plan import MOST_PADDING
from imsm_core.reference import reference_generate
from runtime import Session
from tests.builders import CONTEXT
from tests.exported import PROMPT, Exported, export_tiny

STEPS = 24
ATOL = RTOL = 1e-4

# name -> how the model is made; between them: head sizes that fuse rotation, that do not, and that need padding;
# tied and untied; grouped and plain heads; biases; norms on q and k; Conv1D; learned positions; some layers alone.
MODELS: dict[str, dict[str, Any]] = {
    "llama with head size 8": {"kind": "llama", "head_dim": 8},
    "llama with head size 12, tied": {"kind": "llama", "head_dim": 12, "tied": True},
    "qwen2 with head size 16, tied": {"kind": "qwen2", "head_dim": 16, "tied": True},
    "qwen3 with head size 16": {"kind": "qwen3", "head_dim": 16},
    "gpt2 with head size 12": {"kind": "gpt2", "head_dim": 12},
    "qwen2, two projections": {"kind": "qwen2", "head_dim": 16, "target_modules": ["v_proj", "down_proj"]},
}


@pytest.fixture(scope="module", params=MODELS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_tiny(tmp_path_factory.mktemp("exported"), **MODELS[request.param])


def test_cached_decode_equals_the_uncached_oracle(exported: Exported) -> None:
    expected = reference_generate(exported.model, PROMPT, STEPS)
    session = Session(exported.artifact)
    state = session.new_state(1)
    output = session.prefill(state, [PROMPT])
    for step in expected:
        np.testing.assert_allclose(output.logits[0], step.logits.numpy(), atol=ATOL, rtol=RTOL)
        assert output.gate_mean is not None
        np.testing.assert_allclose(output.gate_mean[0], step.gate.mean(), atol=ATOL)
        assert int(output.logits[0].argmax()) == step.token
        output = session.decode_step(state, [step.token])


def test_the_export_wrote_its_own_parity_report(exported: Exported) -> None:
    parity = exported.manifest["parity"]
    assert set(parity["max_abs_difference"]) == {"prefill", "decode", "chunked prefill", "one memory"}
    for way, differences in parity["max_abs_difference"].items():
        whole = {"hidden_base", "hidden_adapter", "hidden_fused", "gate", "logits"}
        assert set(differences) == ({"logits_base", "logits_adapter"} if way == "one memory" else whole)
        assert 0 < max(differences.values()) < 1e-3
    assert parity["greedy_tokens_equal"] == parity["decode_steps"] == 64


def test_backbone_weights_are_stored_once(exported: Exported) -> None:
    parameters = sum(parameter.numel() for parameter in exported.model.parameters())  # tied ones are counted once
    rows = {"none": 0, "node": CONTEXT, "fused": CONTEXT + MOST_PADDING}[exported.manifest["graph"]["rotary"]]
    tables = rows and rows * exported.model.causal_lm.config.head_dim  # cos and sin, half the head size each
    size = (exported.artifact / "model.onnx.data").stat().st_size
    assert size <= 1.02 * 4 * (parameters + tables)


def test_a_ragged_batch_decodes_like_each_prompt_alone(exported: Exported) -> None:
    session = Session(exported.artifact)
    prompts = [PROMPT, PROMPT[3:7], [9]]
    together = session.new_state(len(prompts))
    output = session.prefill(together, prompts)
    alone = [session.new_state(1) for _ in prompts]
    single = [session.prefill(state, [prompt]) for state, prompt in zip(alone, prompts, strict=True)]
    for _ in range(4):
        for row, one in enumerate(single):
            np.testing.assert_allclose(output.logits[row], one.logits[0], atol=ATOL, rtol=RTOL)
        tokens = output.logits.argmax(-1)
        output = session.decode_step(together, tokens)
        single = [session.decode_step(state, [token]) for state, token in zip(alone, tokens, strict=True)]


def test_exporting_leaves_the_pytorch_model_as_it_was(exported: Exported, tmp_path: Path) -> None:
    kinds = {type(layer).__module__ for layer in exported.model.modules()}
    assert not any(kind.startswith("export") for kind in kinds)
    assert exported.model.causal_lm.config._attn_implementation == "sdpa"
