"""Guessed tokens: the text is the same, the state holds what was given out, and guesses that do not pay end."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import pytest

from runtime import (
    DecodeState,
    History,
    Model,
    PrefixCache,
    PromptError,
    SettingsError,
    Speculation,
    generate,
    generate_step,
    load,
)
from runtime.engine import cache
from runtime.engine.providers import ON_DEVICE
from runtime.generation.speculation import MOST_PATIENCE, PATIENCE, followers
from tests.exported import PROMPT, Exported


@pytest.fixture(scope="module", params=["host", "device"])
def model(request: pytest.FixtureRequest, tiny: Exported) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "BLOCK", 16)  # so that caches grow on the way
        if request.param == "device":
            patch.setitem(ON_DEVICE, "cpu", "cpu")
        yield load(tiny.artifact, threads=1)


class Knowing(Speculation):
    """Guesses the tokens that will come after a prompt, and a wrong one at some places."""

    def __init__(self, most: int, prompt: Sequence[int], text: Sequence[int], wrong: Sequence[int]) -> None:
        super().__init__(most)
        self.begun = len(prompt)
        self.guesses = [(token + 1) % 200 if place in wrong else token for place, token in enumerate(text)]
        self.lengths: list[int] = []

    def draft(self, ids: Any, room: int) -> list[int]:
        first = len(ids) - self.begun
        found = self.guesses[first : first + min(self.most, room)]
        self.lengths.append(len(found))
        return found


WRONG = {"none": (), "some": (2, 3, 9, 16), "all": range(40)}
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.9, "top_k": 40, "seed": 3},
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.2, "logprobs": 2},
    "traced": {"trace": 2, "memory_bias": 0.7},
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", SETTINGS)
def test_the_tokens_are_those_of_single_steps(
    model: Model, name: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_new_tokens": 24, **SETTINGS[name]}
    states = [model.session.new_state(1, settings.pop("memory_bias", 0.0)) for _ in range(2)]
    states[1].memory_bias[:] = states[0].memory_bias
    plain = generate(model, PROMPT, state=states[0], **settings)
    speculation = Knowing(4, PROMPT, plain.token_ids, WRONG[wrong])
    monkeypatch.setattr("runtime.generation.generation._speculation", lambda settings: speculation)
    found = generate(model, PROMPT, state=states[1], speculate=4, **settings)
    assert found.token_ids == plain.token_ids
    assert (found.text, found.finish_reason) == (plain.text, plain.finish_reason)
    assert found.gate_means == pytest.approx(plain.gate_means, abs=1e-5)
    if plain.logprobs is not None:
        assert found.logprobs == pytest.approx(plain.logprobs, abs=1e-4)
    for one, other in zip(found.tokens, plain.tokens, strict=True):
        if other.trace is not None:
            assert one.trace is not None
            for part, expected in zip(one.trace, other.trace, strict=True):
                assert [candidate.id for candidate in part] == [candidate.id for candidate in expected]
    counts = found.timings
    assert counts.drafted == speculation.drafted == sum(speculation.lengths)
    assert counts.passes == sum(length > 0 for length in speculation.lengths)
    assert counts.accepted == {"none": 18, "all": 0}.get(wrong, counts.accepted)
    assert_alike(model, *states)


def assert_alike(model: Model, state: DecodeState, other: DecodeState) -> None:
    """Two states hold the same, and a conversation goes on from them alike."""
    session = model.session
    assert (state.pending, state.lengths.tolist()) == (other.pending, other.lengths.tolist())
    assert state.cut_lengths(0) == other.cut_lengths(0)
    for name in ("query_sum", "query_count", "reply_sum", "reply_count"):
        np.testing.assert_allclose(getattr(state, name), getattr(other, name), atol=1e-4)
    if state.lengths[0] + 3 < session.manifest.context_length:
        length = state.lengths[0] - 1  # into what was given out
        outputs = []
        for each in (state, other):
            back = each.take([0], [length])
            outputs += [session.prefill(each, [[7]]).logits, session.decode_step(back, [8]).logits]
        np.testing.assert_allclose(outputs[:2], outputs[2:], atol=1e-4)


@pytest.mark.parametrize("given", [1, 2, 3, 4, 5, 6, 7])
def test_a_generator_that_is_left_midway_leaves_what_it_gave_out(model: Model, given: int) -> None:
    states = [model.session.new_state() for _ in range(2)]
    plain = generate(model, PROMPT, max_new_tokens=12).token_ids
    speculation = Knowing(4, PROMPT, plain, (4,))
    found = [
        [token.id for token in islice(generate_step(model.session, PROMPT, state=state, speculation=each), given)]
        for state, each in zip(states, (None, speculation), strict=True)
    ]
    assert found[0] == found[1] == plain[:given]
    assert_alike(model, *states)


def test_a_text_ends_at_a_token_and_at_a_text_within_a_guess(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = generate(model, PROMPT, max_new_tokens=12)
    place = next(index for index in range(2, 12) if plain.token_ids[index] not in plain.token_ids[:index])
    ends: list[dict[str, Any]] = [{"stop_token_ids": [plain.token_ids[place]]}]
    visible = [character for character in plain.text[3:] if character.isalnum()]
    ends += [{"stop": [visible[0]]}] if visible else []
    for end in ends:
        states = [model.session.new_state() for _ in range(2)]
        expected = generate(model, PROMPT, max_new_tokens=12, state=states[0], **end)
        speculation = Knowing(6, PROMPT, plain.token_ids, ())
        with monkeypatch.context() as patch:
            patch.setattr("runtime.generation.generation._speculation", lambda settings, made=speculation: made)
            found = generate(model, PROMPT, max_new_tokens=12, state=states[1], speculate=6, **end)
        assert expected.finish_reason == "stop"
        assert (found.text, found.token_ids, found.stopped_by) == (
            expected.text,
            expected.token_ids,
            expected.stopped_by,
        )
        assert_alike(model, *states)


def test_the_context_ends_a_text_as_it_does_without(model: Model) -> None:
    prompt = [5, 6, 7] * 40
    states = [model.session.new_state() for _ in range(2)]
    plain = [token.id for token in generate_step(model.session, prompt, state=states[0])]
    speculation = Knowing(6, prompt, plain, (3,))
    found = [token.id for token in generate_step(model.session, prompt, state=states[1], speculation=speculation)]
    assert found == plain
    assert len(found) == 9
    assert speculation.accepted > 3
    assert_alike(model, *states)


def test_a_state_that_others_used_between_two_tokens_is_refused(model: Model) -> None:
    state = model.session.new_state()
    plain = generate(model, PROMPT, max_new_tokens=6).token_ids
    steps = generate_step(model.session, PROMPT, state=state, speculation=Knowing(4, PROMPT, plain, ()))
    list(islice(steps, 2))
    model.session.decode_step(state, [3])
    with pytest.raises(PromptError, match="used by others"):
        next(steps)


def test_a_copy_between_two_tokens_is_of_what_was_given_out(model: Model) -> None:
    state = model.session.new_state()
    plain = generate(model, PROMPT, max_new_tokens=8).token_ids
    steps = generate_step(model.session, PROMPT, state=state, speculation=Knowing(4, PROMPT, plain, ()))
    list(islice(steps, 3))
    other = state.take([0])
    state.join(other)  # the caches move
    state.drop([1])
    assert [token.id for token in islice(steps, 5)] == plain[3:]
    rest = generate_step(model.session, [60], state=other)
    fresh = model.session.new_state()
    list(islice(generate_step(model.session, PROMPT, state=fresh), 3))
    expected = generate_step(model.session, [60], state=fresh)
    assert [token.id for token in islice(rest, 3)] == [token.id for token in islice(expected, 3)]


def test_processors_and_guesses_go_by_what_a_kept_text_holds(model: Model) -> None:
    kept, prompt = PrefixCache(model.session, 10**8), [*PROMPT, 40, 41]
    kept.put(PROMPT, generated_state(model, PROMPT))
    seen: list[list[int]] = []

    def watching(history: History, logits: Any) -> Any:
        seen.append(history.ids.tolist())
        return logits

    state, n = kept.take(prompt)
    assert n == len(PROMPT)
    steps = generate_step(model.session, prompt[n:], state=state, held=prompt[:n], processors=[watching])
    said = [token.id for token in islice(steps, 3)]
    assert seen == [prompt, [*prompt, said[0]], [*prompt, *said[:2]]]
    assert said == generate(model, prompt, max_new_tokens=3).token_ids
    assert kept.put([*prompt, *said[:-1]], state)


def generated_state(model: Model, prompt: Sequence[int]) -> DecodeState:
    state = model.session.new_state()
    model.session.prefill(state, [prompt])
    return state


def test_guesses_of_the_text_itself_give_the_same_text(model: Model) -> None:
    for prompt in (PROMPT * 3, [5, 6, 7, 8] * 8, list(range(30, 60)) * 2):
        plain = generate(model, prompt, max_new_tokens=30)
        found = generate(model, prompt, max_new_tokens=30, speculate=5)
        assert found.token_ids == plain.token_ids
        assert found.timings.accepted <= found.timings.drafted
        assert plain.timings.drafted == 0


@pytest.mark.parametrize(
    ("text", "ngram", "expected"),
    [
        ([1, 2, 3, 4, 1, 2], 2, [3, 4, 1]),
        ([1, 2, 3, 1, 2, 4, 1, 2], 2, [4, 1, 2]),  # the later place
        ([1, 2, 3, 4, 5], 2, []),
        ([7, 7, 7], 2, [7]),
        ([1, 2], 2, []),
        ([1], 2, []),
        ([9, 1, 2, 3, 8, 1, 2, 3], 3, [8, 1, 2]),
    ],
)
def test_a_guess_is_what_followed_before(text: list[int], ngram: int, expected: list[int]) -> None:
    assert followers(np.array(text), ngram, 3) == expected


TEXT = np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3])


def measured(most: int, step: float, more: float) -> Speculation:
    speculation = Speculation(most)
    assert speculation.draft(TEXT, 100) == []  # a step alone is timed first
    speculation.timed(1, step)
    assert speculation.draft(TEXT, 100) == [4, 5]
    speculation.timed(3, step + 2 * more)
    return speculation


def test_guesses_are_as_long_as_they_pay() -> None:
    cheap, dear = measured(6, 1.0, 0.01), measured(6, 1.0, 0.4)
    lengths = []
    for speculation in (cheap, dear):
        for _ in range(30):
            speculation.judged(True)
        speculation.judged(False)
        lengths.append(len(speculation.draft(TEXT, 100)))
    assert lengths[0] == 6 > lengths[1] > 0
    assert cheap.draft(TEXT, 2) == [4, 5]
    assert cheap.draft(TEXT, 0) == []


def test_a_length_that_was_slow_is_avoided() -> None:
    speculation = measured(6, 1.0, 0.1)
    for _ in range(30):
        speculation.judged(True)
    assert len(speculation.draft(TEXT, 100)) == 6
    speculation.timed(7, 9.0)
    speculation.timed(5, 1.4)
    assert len(speculation.draft(TEXT, 100)) == 4


def test_guesses_that_do_not_pay_end_for_a_while_and_are_tried_again() -> None:
    speculation = measured(6, 1.0, 0.5)
    for _ in range(10):
        speculation.judged(False)
    waits = []
    for _ in range(6):
        waited = 1
        while not speculation.draft(TEXT, 100):
            waited += 1
        waits.append(waited)
        speculation.timed(2, 1.5)
        speculation.judged(False)
    assert waits == [MOST_PATIENCE] * 6
    for _ in range(30):
        speculation.judged(True)
    assert len(speculation.draft(TEXT, 100)) > 1
    fresh = measured(6, 1.0, 2.0)
    assert [len(fresh.draft(TEXT, 100)) for _ in range(PATIENCE)] == [0] * (PATIENCE - 1) + [1]


def test_a_number_of_guesses_outside_its_range_is_refused(model: Model) -> None:
    with pytest.raises(SettingsError, match=r"speculate is 63; it must be 0 \(off\) to 62"):
        generate(model, PROMPT, speculate=63)
    with pytest.raises(SettingsError, match="speculate is 0; it must be 1 to 62"):
        Speculation(0)
