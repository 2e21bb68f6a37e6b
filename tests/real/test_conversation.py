"""A real model keeps up a conversation in a state, and is told who it is once."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from export.settings import ExportSettings
from runtime import Chat, Model, generate, load
from tests.real.exports import export_real

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def model(smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(export_real(tmp_path_factory.mktemp("talk"), smollm2_folder, "lora", ExportSettings()).artifact)


def test_the_second_question_refers_to_the_first(model: Model) -> None:
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


def test_a_chat_goes_on_after_replies_that_ended_in_all_ways(model: Model) -> None:
    """By the end token, by a length, by a stop string that begins within a token, and left in the middle."""
    chat = Chat(model, system="You are a geographer. Be brief.")
    for text in chat.send("What is the capital of France?"):
        reason = text.finish_reason
    assert reason == "stop"
    chat.change(max_new_tokens=5)
    for text in chat.send("And of Italy? Tell me about it."):
        reason = text.finish_reason
    assert reason == "length"
    last = next(word for word in chat.messages[-1]["content"].split() if len(word) > 3)
    chat.change(max_new_tokens=40, stop=[last[2:], "pital"])
    for text in chat.send("Say that again."):
        reason = text.finish_reason
    assert reason == "stop"
    assert chat.messages[-1]["content"][-1].isalpha()  # in the middle of a word
    chat.change(stop=(), max_new_tokens=200)
    reply = chat.send("Tell me a story.")
    told = "".join(chunk.text for chunk in islice(reply, 30))
    reply.close()
    assert chat.messages[-1]["content"] == told
    before = chat.messages
    chat.change(max_new_tokens=24)
    found = [chunk.token.id for chunk in chat.send("Go on.") if chunk.token]
    ids = model.codec.encode_chat([*before, {"role": "user", "content": "Go on."}])
    assert found == generate(model, ids, max_new_tokens=24).token_ids
    assert chat.tokens == len(ids) + len(found) - 1
