"""Log-probabilities of prompts: by the gate that their answers have, in one chunk and in many."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from runtime import PromptError, Session, SettingsError
from tests.exported import PROMPT, Exported

TEXT = [*PROMPT, 40, 41, 42, 7]


@pytest.fixture(scope="module")
def session(tiny: Exported) -> Session:
    return Session(tiny.artifact, threads=1)


def oracle(exported: Exported, bias: float) -> np.ndarray:
    """Log-probabilities (S, vocab) after each token of TEXT, all of which is the query."""
    model, count = exported.model, len(TEXT)
    with torch.no_grad():
        states = model.stream_states(torch.tensor([TEXT]))
        rows, query = torch.zeros(count, dtype=torch.long), torch.ones((1, count), dtype=torch.long)
        logits, _ = model.fused_logits(states, query, rows, torch.arange(count), bias)
    return logits.double().log_softmax(-1).numpy()


@pytest.mark.parametrize("chunk", [64, 4, 1])
@pytest.mark.parametrize("bias", [0.0, 0.7])
def test_they_are_those_of_pytorch_with_the_whole_prompt_as_the_query(
    tiny: Exported, session: Session, monkeypatch: pytest.MonkeyPatch, chunk: int, bias: float
) -> None:
    expected = oracle(tiny, bias)
    monkeypatch.setattr(session, "prefill_rows", 2 * chunk)
    found = session.prompt_logprobs(TEXT, bias, k=3)
    np.testing.assert_allclose(found.logprobs, expected[range(len(TEXT) - 1), TEXT[1:]], atol=1e-4)
    likeliest = np.argsort(-expected[:-1], -1)[:, :3]
    np.testing.assert_array_equal(found.ids, likeliest)
    np.testing.assert_allclose(found.id_logprobs, np.take_along_axis(expected[:-1], likeliest, -1), atol=1e-4)
    plain = session.new_state(1, bias)
    output = session.prefill(plain, [TEXT])
    np.testing.assert_allclose(found.output.logits, output.logits, atol=1e-4)
    assert found.gate_mean is not None
    assert found.output.gate_mean is not None
    assert output.gate_mean is not None
    assert found.gate_mean.shape == (len(TEXT) - 1,)
    np.testing.assert_allclose(found.output.gate_mean, output.gate_mean, atol=1e-5)
    np.testing.assert_allclose(found.state.query_sum, plain.query_sum, atol=1e-4)
    for token in (9, 8):
        following = session.decode_step(plain, [token]).logits
        np.testing.assert_allclose(session.decode_step(found.state, [token]).logits, following, atol=1e-4)


def test_another_query_would_be_noticed(tiny: Exported, session: Session) -> None:
    scored = session.score(TEXT[:1], TEXT[1:])  # whose query is the first token
    assert np.abs(scored - session.prompt_logprobs(TEXT).logprobs).max() > 1e-2


def test_a_prompt_of_one_token_has_none_and_goes_on(session: Session) -> None:
    found = session.prompt_logprobs([5], k=2)
    assert (found.logprobs.shape, found.ids.shape, found.id_logprobs.shape) == ((0,), (0, 2), (0, 2))
    np.testing.assert_allclose(found.output.logits, session.prefill(session.new_state(), [[5]]).logits, atol=1e-5)


def test_what_is_no_prompt_and_no_number_of_tokens_is_refused(session: Session) -> None:
    with pytest.raises(PromptError, match="is empty"):
        session.prompt_logprobs([])
    with pytest.raises(SettingsError, match="k is 260; it must be 0 to 259"):
        session.prompt_logprobs(PROMPT, k=260)
