"""The five invariants of the method, on the exported file, against plain transformers and PEFT.

1. gate forced to 1 is the base model; 2. gate forced to 0 is the base model with the adapter merged; 3. gate_up = 0
gives the mean of both streams' logits; 4. a fresh LoRA makes any gate give the base model; 5. cached, chunked, ragged
and continued texts equal a fresh run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import PeftModel
from transformers import AutoModelForCausalLM

from runtime import Session
from tests.exported import PROMPT, Exported, export_tiny

FORCED = 1e4
TEXT = [*PROMPT, 44, 45, 130, 17, 200]
ATOL = RTOL = 1e-4


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_tiny(tmp_path_factory.mktemp("invariants"), "qwen2", head_dim=16, tied=True)


def logits_along(session: Session, prompt: Sequence[int], rest: Sequence[int], bias: float) -> NDArray[np.float32]:
    """Logits after the prompt and after each fed token: (1 + len(rest), vocab)."""
    state = session.new_state(1, memory_bias=bias)
    outputs = [session.prefill(state, [prompt]), *(session.decode_step(state, [token]) for token in rest)]
    return np.concatenate([output.logits for output in outputs])


@torch.no_grad()
def plain_logits(model: torch.nn.Module, start: int) -> NDArray[np.float32]:
    """A plain model's logits over TEXT from position `start` - 1 on."""
    logits: NDArray[np.float32] = model(input_ids=torch.tensor([TEXT])).logits[0, start - 1 :].numpy()
    return logits


def base_model(exported: Exported) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(str(exported.base), dtype=torch.float32)
    return model.eval()


def merged_model(exported: Exported) -> torch.nn.Module:
    tuned = PeftModel.from_pretrained(base_model(exported), str(exported.checkpoint / "adapter"))
    merged: torch.nn.Module = tuned.merge_and_unload()
    return merged.eval()


def test_gate_forced_to_one_is_the_base_model(exported: Exported) -> None:
    found = logits_along(Session(exported.artifact), PROMPT, TEXT[len(PROMPT) :], FORCED)
    np.testing.assert_allclose(found, plain_logits(base_model(exported), len(PROMPT)), atol=ATOL, rtol=RTOL)


def test_gate_forced_to_zero_is_the_model_with_the_adapter_merged(exported: Exported) -> None:
    found = logits_along(Session(exported.artifact), PROMPT, TEXT[len(PROMPT) :], -FORCED)
    expected = plain_logits(merged_model(exported), len(PROMPT))
    np.testing.assert_allclose(found, expected, atol=ATOL, rtol=RTOL)
    assert np.abs(expected - plain_logits(base_model(exported), len(PROMPT))).max() > 0.5  # the adapter does matter


def test_an_untrained_gate_gives_the_mean_of_both_streams_logits(tmp_path: Path) -> None:
    exported = export_tiny(tmp_path, "qwen2", head_dim=16, zero="gate_up")
    found = logits_along(Session(exported.artifact), PROMPT, TEXT[len(PROMPT) :], 0.0)
    both = [plain_logits(model, len(PROMPT)) for model in (base_model(exported), merged_model(exported))]
    np.testing.assert_allclose(found, sum(both) / 2, atol=ATOL, rtol=RTOL)


def test_a_fresh_lora_gives_the_base_model_at_any_gate(tmp_path: Path) -> None:
    exported = export_tiny(tmp_path, "qwen2", head_dim=16, zero="lora_B")
    expected = plain_logits(base_model(exported), len(PROMPT))
    for bias in (0.0, -FORCED, 2.0):
        found = logits_along(Session(exported.artifact), PROMPT, TEXT[len(PROMPT) :], bias)
        np.testing.assert_allclose(found, expected, atol=ATOL, rtol=RTOL)


@pytest.mark.parametrize("chunk", [1, 3, 10, 11])
def test_chunked_prefill_equals_whole_prefill(exported: Exported, chunk: int) -> None:
    session = Session(exported.artifact)
    whole, pieces = session.new_state(1), session.new_state(1)
    expected, found = session.prefill(whole, [PROMPT]), session.prefill(pieces, [PROMPT], chunk=chunk)
    np.testing.assert_allclose(found.logits, expected.logits, atol=ATOL, rtol=RTOL)
    np.testing.assert_allclose(pieces.query_sum, whole.query_sum, atol=ATOL, rtol=RTOL)
    assert pieces.query_count == whole.query_count == len(PROMPT)


def test_a_chunked_ragged_batch_equals_each_prompt_alone(exported: Exported) -> None:
    session = Session(exported.artifact)
    prompts = [PROMPT, PROMPT[4:6], TEXT]
    state = session.new_state(3)
    found = session.prefill(state, prompts, chunk=4)
    for row, prompt in enumerate(prompts):
        alone = session.prefill(session.new_state(1), [prompt])
        np.testing.assert_allclose(found.logits[row], alone.logits[0], atol=ATOL, rtol=RTOL)
    assert list(state.lengths) == [len(prompt) for prompt in prompts]


def test_a_continued_conversation_equals_a_fresh_run_over_the_whole_of_it(exported: Exported) -> None:
    session = Session(exported.artifact)
    reply, more = [61, 62, 63, 64], [70, 71, 72]
    state = session.new_state(1)
    session.prefill(state, [PROMPT])
    for token in reply:
        session.decode_step(state, [token])
    found = session.prefill(state, [more])
    fresh = session.new_state(1)
    expected = session.prefill(fresh, [[*PROMPT, *reply, *more]])
    np.testing.assert_allclose(found.logits, expected.logits, atol=ATOL, rtol=RTOL)
    assert found.gate_mean is not None
    assert expected.gate_mean is not None
    np.testing.assert_allclose(found.gate_mean, expected.gate_mean, atol=1e-5)
    for token in (3, 4, 5):  # and on the way on
        found, expected = session.decode_step(state, [token]), session.decode_step(fresh, [token])
        np.testing.assert_allclose(found.logits, expected.logits, atol=ATOL, rtol=RTOL)


def test_a_continued_ragged_batch_equals_fresh_runs(exported: Exported) -> None:
    session = Session(exported.artifact)
    prompts, more = [PROMPT, PROMPT[2:5]], [[90, 91], [92, 93, 94]]
    state = session.new_state(2)
    session.prefill(state, prompts)
    session.decode_step(state, [7, 8])
    found = session.prefill(state, more)
    for row, (prompt, reply, rest) in enumerate(zip(prompts, (7, 8), more, strict=True)):
        fresh = session.prefill(session.new_state(1), [[*prompt, reply, *rest]])
        np.testing.assert_allclose(found.logits[row], fresh.logits[0], atol=ATOL, rtol=RTOL)


def test_generated_tokens_do_not_enter_the_query(exported: Exported) -> None:
    session = Session(exported.artifact)
    state = session.new_state(1)
    session.prefill(state, [PROMPT])
    before = state.query_sum.copy()
    session.decode_step(state, [50])
    np.testing.assert_array_equal(state.query_sum, before)
    assert np.abs(state.reply_sum).max() > 0
