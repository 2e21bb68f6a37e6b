"""Continuous batching: every text is what it would be alone, whenever it joins and whoever leaves."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest

from runtime import (
    Batch,
    DecodeState,
    GenerationSettings,
    Model,
    PrefixCache,
    PromptError,
    SettingsError,
    StepOutput,
    generate,
    generate_batch,
    load,
    stream_batch,
)
from tests.exported import Exported


@pytest.fixture(scope="module")
def model(tiny: Exported) -> Model:
    return load(tiny.artifact)


GENERATOR = random.Random(1)
PROMPTS = [[GENERATOR.randrange(4, 60) for _ in range(GENERATOR.randrange(1, 70))] for _ in range(9)]
SETTINGS = [
    GenerationSettings(max_new_tokens=1 + 7 * number % 23, memory_bias=float(number - 4)) for number in range(9)
]


def test_texts_are_those_of_solo_runs_while_rows_join_and_leave(model: Model) -> None:
    together = generate_batch(model, PROMPTS, SETTINGS, most_rows=3)
    for prompt, settings, found in zip(PROMPTS, SETTINGS, together, strict=True):
        alone = generate(model, prompt, settings)
        assert (found.token_ids, found.text, found.finish_reason) == (alone.token_ids, alone.text, alone.finish_reason)
        assert (found.timings.prompt_tokens, found.timings.new_tokens) == (len(prompt), len(alone.tokens))
        np.testing.assert_allclose(found.gate_means or [], alone.gate_means or [], atol=1e-5)


def test_a_seed_draws_the_same_tokens_in_any_batch(model: Model) -> None:
    settings: dict[str, Any] = {"temperature": 1.5, "top_p": 0.95, "repetition_penalty": 1.2, "max_new_tokens": 12}
    several = [GenerationSettings(seed=number, **settings) for number in range(5)]
    alone = [generate(model, PROMPTS[0], each).token_ids for each in several]
    assert len(set(map(tuple, alone))) > 1
    for rows in (1, 2, 5):
        together = generate_batch(model, [PROMPTS[0]] * 5, several, most_rows=rows)
        assert [found.token_ids for found in together] == alone


def test_rows_leave_as_soon_as_they_end(model: Model) -> None:
    batch = Batch(model, most_rows=4)
    for number in range(4):
        batch.add(number, PROMPTS[number], max_new_tokens=2 + 3 * number)
    active = []
    while batch.active or batch.waiting:
        batch.step()
        active.append(batch.active)
    assert max(active) == 4 - 1  # the first has ended when the last is read
    assert active[-1] == 0
    assert [size for size, after in itertools.pairwise(active) if after < size] == [3, 2, 1]


def test_a_long_prompt_is_read_in_pieces_and_the_others_go_on(model: Model) -> None:
    long, short = [5] * 100, [6, 7]
    batch = Batch(model, most_rows=2, piece_ms=1e-6)  # a token at a time
    batch.add("short", short, max_new_tokens=200)
    batch.step()
    batch.add("long", long, max_new_tokens=3)
    before: list[int] = []
    long_ids: list[int] = []
    while len(long_ids) < 3:
        events = batch.step()
        for event in events:
            assert event.chunk is not None
            assert event.chunk.token is not None
            (long_ids if event.key == "long" else before).append(event.chunk.token.id)
        assert any(event.key == "short" for event in events)
    assert len(before) >= 85
    assert long_ids == generate(model, long, max_new_tokens=3).token_ids
    assert before == generate(model, short, max_new_tokens=200).token_ids[1 : 1 + len(before)]


def test_a_prompt_is_read_at_once_where_nobody_waits_whatever_the_times_are(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    prefill = model.session.prefill

    def noted(state: DecodeState, prompts: list[list[int]], **how: Any) -> StepOutput:
        read.append(len(prompts[0]))
        return prefill(state, prompts, **how)

    seconds = itertools.count()
    monkeypatch.setattr(model.session, "prefill", noted)
    monkeypatch.setattr("runtime.generation.batching.time.perf_counter", lambda: float(next(seconds)))
    generate_batch(model, PROMPTS, max_new_tokens=9, most_rows=3)
    assert read == [len(prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("when", [0, 3, 8])
def test_who_is_cancelled_leaves_and_the_others_do_not_notice(model: Model, when: int) -> None:
    batch = Batch(model, most_rows=2)
    for number in range(4):
        batch.add(number, PROMPTS[number], max_new_tokens=10)
    found: dict[int, list[int]] = {number: [] for number in range(4)}
    steps = 0
    while batch.active or batch.waiting:
        if steps == when:
            assert batch.cancel(1)
            assert not batch.cancel(1)
        for event in batch.step():
            assert event.chunk is not None
            assert event.chunk.token is not None
            found[event.key].append(event.chunk.token.id)
        steps += 1
    for number in (0, 2, 3):
        assert found[number] == generate(model, PROMPTS[number], max_new_tokens=10).token_ids
    assert len(found[1]) < 10


def test_an_error_of_one_text_ends_it_alone(model: Model) -> None:
    batch = Batch(model)
    batch.add("good", PROMPTS[0], max_new_tokens=5)
    everything = {token: -np.inf for token in range(model.session.manifest.vocab_size)}
    batch.add("bad", PROMPTS[1], max_new_tokens=5, logit_bias=everything)
    errors, tokens = {}, []
    while batch.active or batch.waiting:
        for event in batch.step():
            if event.error is not None:
                errors[event.key] = str(event.error)
            elif event.chunk is not None and event.chunk.token is not None:
                tokens.append(event.chunk.token.id)
    assert list(errors) == ["bad"]
    assert "no token is allowed" in errors["bad"]
    assert tokens == generate(model, PROMPTS[0], max_new_tokens=5).token_ids


def test_what_is_wrong_with_a_text_is_told_when_it_is_added(model: Model) -> None:
    batch = Batch(model)
    with pytest.raises(PromptError, match="the prompt has 129 tokens"):
        batch.add(0, [5] * 129)
    with pytest.raises(SettingsError, match="max_new_tokens is 0"):
        batch.add(0, [5], max_new_tokens=0)
    with pytest.raises(SettingsError, match="most_rows is 0"):
        Batch(model, most_rows=0)
    with pytest.raises(SettingsError, match="piece_ms is nan"):
        Batch(model, piece_ms=float("nan"))
    assert (batch.active, batch.waiting, batch.step()) == (0, 0, [])


def test_a_text_ends_at_the_contexts_end_and_the_others_go_on(model: Model) -> None:
    prompts = [[5] * 120, [6, 7, 8]]
    together = generate_batch(model, prompts, max_new_tokens=30)
    for prompt, found in zip(prompts, together, strict=True):
        alone = generate(model, prompt, max_new_tokens=30)
        assert (found.token_ids, found.text, found.finish_reason) == (alone.token_ids, alone.text, alone.finish_reason)
    assert len(together[0].tokens) == 9


def test_a_trace_of_one_text_is_no_other_ones(model: Model) -> None:
    settings = [GenerationSettings(max_new_tokens=4, trace=2), GenerationSettings(max_new_tokens=4)]
    traced, plain = generate_batch(model, PROMPTS[:2], settings)
    assert all(token.trace is None for token in plain.tokens)
    alone = generate(model, PROMPTS[0], settings[0])
    for found, expected in zip(traced.tokens, alone.tokens, strict=True):
        assert found.trace is not None
        assert expected.trace is not None
        for ours, theirs in zip(found.trace, expected.trace, strict=True):
            assert [each.id for each in ours] == [each.id for each in theirs]


def test_chunks_of_a_stream_make_the_texts(model: Model) -> None:
    texts = ["", ""]
    for number, chunk in stream_batch(model, PROMPTS[:2], max_new_tokens=6):
        texts[number] += chunk.text
    assert texts == [generate(model, prompt, max_new_tokens=6).text for prompt in PROMPTS[:2]]


def test_a_conversation_that_goes_on_reads_what_is_new_alone(model: Model) -> None:
    prefixes = PrefixCache(model.session, 1 << 24)
    batch = Batch(model, most_rows=2, prefixes=prefixes)
    batch.add("first", PROMPTS[0], max_new_tokens=6)
    batch.add("other", PROMPTS[1], max_new_tokens=30)
    ids = list(PROMPTS[0])
    while batch.active or batch.waiting:
        for event in batch.step():
            assert event.held == 0
            if event.key == "first" and event.chunk is not None and event.chunk.token is not None:
                ids.append(event.chunk.token.id)
    prompt = [*ids, 9, 10, 11]
    expected = generate(model, prompt, max_new_tokens=8, memory_bias=1.0, repetition_penalty=1.3)
    batch.add("second", prompt, max_new_tokens=8, memory_bias=1.0, repetition_penalty=1.3)
    found: list[int] = []
    while batch.active or batch.waiting:
        for event in batch.step():
            assert event.held == len(ids) - 1  # the last token of a text is not read
            if event.chunk is not None and event.chunk.token is not None:
                found.append(event.chunk.token.id)
    assert found == expected.token_ids


@pytest.mark.parametrize("when", [1, 4, 9])
def test_what_was_read_of_a_cancelled_text_is_kept(model: Model, when: int) -> None:
    prompt, prefixes = [5, 6, 7] * 10, PrefixCache(model.session, 1 << 24)
    batch = Batch(model, alone_ms=1e-6, prefixes=prefixes)
    batch.add(0, prompt, max_new_tokens=90)
    for _ in range(when):
        assert not [event for event in batch.step() if event.chunk is not None] or when > 4
    assert batch.cancel(0)
    assert (batch.active, batch.waiting, len(prefixes)) == (0, 0, 1)
    expected = generate(model, prompt, max_new_tokens=5).token_ids
    found: list[int] = []
    batch.add(1, prompt, max_new_tokens=5)
    while batch.active or batch.waiting:
        for event in batch.step():
            assert event.held > 0
            assert event.chunk is not None
            assert event.chunk.token is not None
            found.append(event.chunk.token.id)
    assert found == expected


def test_a_prompt_that_several_wait_with_is_read_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    prefill = model.session.prefill

    def counted(state: Any, prompts: Any, **more: Any) -> Any:
        read.append(len(prompts[0]))
        return prefill(state, prompts, **more)

    monkeypatch.setattr(model.session, "prefill", counted)
    prompt = PROMPTS[1]
    biases = [0.0, 0.0, 1.0, 0.0, 1.0]
    settings = [
        GenerationSettings(seed=number, temperature=1.2, max_new_tokens=6 + number, memory_bias=bias)
        for number, bias in enumerate(biases)
    ]
    together = generate_batch(model, [prompt] * 5, settings, most_rows=2)
    assert sum(read) == 2 * len(prompt)
    monkeypatch.undo()
    for found, own in zip(together, settings, strict=True):
        assert found.token_ids == generate(model, prompt, own).token_ids
