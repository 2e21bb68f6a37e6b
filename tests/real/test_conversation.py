"""A real model keeps up a conversation in a state, and is told who it is once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from export.settings import ExportSettings
from runtime import generate, load
from tests.real.exports import export_real

pytestmark = pytest.mark.real


def test_the_second_question_refers_to_the_first(smollm2_folder: Path, tmp_path: Path) -> None:
    model = load(export_real(tmp_path, smollm2_folder, "lora", ExportSettings()).artifact)
    state = model.session.new_state(1, memory_bias=1e4)
    questions, answers = ["What is the capital of France?", "And of Italy?"], ["Paris", "Rome"]
    messages: list[dict[str, str]] = []
    for question, answer in zip(questions, answers, strict=True):
        reply = generate(model, question, state=state, max_new_tokens=40)
        assert answer in reply.text
        assert reply.finish_reason == "stop"
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply.text}]
    ids = model.codec.encode_chat([*messages, {"role": "user", "content": "Thank you."}])
    whole = model.session.prefill(model.session.new_state(1, memory_bias=1e4), [ids])
    going_on = model.codec.encode_continuation([{"role": "user", "content": "Thank you."}])[1:]  # its end token is said
    continued = model.session.prefill(state, [going_on])
    assert int(state.lengths[0]) == len(ids)
    np.testing.assert_allclose(continued.logits, whole.logits, atol=2e-3, rtol=1e-3)
