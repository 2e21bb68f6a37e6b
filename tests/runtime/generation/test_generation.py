"""From prompts to text: where generation stops, what it reports, and conversations."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime import (
    History,
    Model,
    PromptError,
    SettingsError,
    generate,
    generate_batch,
    generate_step,
    load,
    make_sampler,
    stream_generate,
)
from runtime.engine.providers import ON_DEVICE
from tests.exported import PROMPT, Exported, copied, edit_manifest


@pytest.fixture(scope="module")
def model(tiny: Exported) -> Model:
    return load(tiny.artifact)


def test_generation_stops_after_max_new_tokens(model: Model) -> None:
    result = generate(model, "Hello", max_new_tokens=5)
    assert result.finish_reason == "length"
    assert len(result.token_ids) == 5
    assert result.text == model.codec.decode(result.token_ids)


def test_generation_stops_at_an_end_token(tiny: Exported, tmp_path: Path) -> None:
    greedy = generate(load(tiny.artifact), "Hello", max_new_tokens=6).token_ids
    artifact = copied(tiny.artifact, tmp_path / "artifact")
    edit_manifest(artifact, tokens=tiny.manifest["tokens"] | {"eos_token_ids": [greedy[3]]})
    result = generate(load(artifact), "Hello", max_new_tokens=6)
    assert result.token_ids == greedy[: greedy.index(greedy[3]) + 1]
    assert result.finish_reason == "stop"


def test_generation_stops_where_the_context_is_full(model: Model) -> None:
    result = generate(model, [5] * 120, max_new_tokens=2**70)
    assert result.finish_reason == "length"
    assert len(result.token_ids) == 9  # the last one is chosen with the context full and is never fed


def test_streamed_chunks_are_the_result(model: Model) -> None:
    chunks = list(stream_generate(model, "Hello", max_new_tokens=8))
    result = generate(model, "Hello", max_new_tokens=8)
    assert "".join(chunk.text for chunk in chunks) == result.text
    assert [chunk.token.id for chunk in chunks if chunk.token] == result.token_ids
    assert [chunk.finish_reason for chunk in chunks] == [None] * 7 + ["length"]


def test_gate_means_come_one_per_token_and_follow_the_bias(model: Model) -> None:
    free = generate(model, "Hello", max_new_tokens=4).gate_means
    assert free is not None
    assert len(free) == 4
    assert all(0 < mean < 1 for mean in free)
    assert generate(model, "Hello", max_new_tokens=4, memory_bias=1e4).gate_means == [1.0] * 4


def test_sampling_with_a_seed_repeats(model: Model) -> None:
    runs = [generate(model, "Hello", max_new_tokens=12, sampler=make_sampler(1.5, seed=4)).token_ids for _ in range(2)]
    assert runs[0] == runs[1]
    assert runs[0] != generate(model, "Hello", max_new_tokens=12).token_ids


def test_a_continued_conversation_equals_one_fresh_run(model: Model) -> None:
    state = model.session.new_state(1)
    reply = [token.id for token in islice(generate_step(model.session, PROMPT, state=state), 5)]
    assert state.pending == [reply[-1]]  # chosen, not yet fed
    more = [30, 31, 32]
    second = [token.id for token in islice(generate_step(model.session, more, state=state), 5)]
    fresh = generate_step(model.session, [*PROMPT, *reply, *more])
    assert second == [token.id for token in islice(fresh, 5)]


def test_bad_settings_are_refused_before_the_first_token(model: Model) -> None:
    with pytest.raises(SettingsError, match="max_new_tokens is 0"):
        next(stream_generate(model, "Hello", max_new_tokens=0))
    with pytest.raises(PromptError, match="the prompt is empty"):
        next(stream_generate(model, ""))
    with pytest.raises(PromptError, match="129 tokens; the model's context is 128"):
        generate(model, "x" * 128)  # and the start token
    with pytest.raises(PromptError, match="a state of one row"):
        next(generate_step(model.session, PROMPT, state=model.session.new_state(2)))
    for name, value, rule in (("logprobs", -1, "at least 0"), ("logprobs", "2", "a whole"), ("trace", 0, "at least 1")):
        with pytest.raises(SettingsError, match=f"{name} is {value}; it must be {rule}"):
            next(generate_step(model.session, PROMPT, **{name: value}))  # type: ignore[arg-type]


def test_timings_count_what_was_done(model: Model) -> None:
    timings = generate(model, "Hello", max_new_tokens=3).timings
    assert (timings.prompt_tokens, timings.new_tokens) == (6, 3)
    assert timings.ttft_ms > 0
    assert timings.tokens_per_s == pytest.approx(1e3 / timings.ms_per_token, rel=1)


SAMPLERS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "top-k": {"temperature": 1.3, "top_k": 5, "top_p": 0.95, "min_p": 0.01, "seed": 3},
    "top-k of all": {"temperature": 1.3, "top_k": 10**6, "seed": 3},
    "no top-k": {"temperature": 1.3, "seed": 3},
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_device_chooses_what_the_host_would(
    model: Model, tiny: Exported, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate(model, "Hello", max_new_tokens=16, **SAMPLERS[name])
    monkeypatch.setitem(ON_DEVICE, "cpu", "cpu")
    there = load(tiny.artifact)
    assert there.session.on_device
    assert generate(there, "Hello", max_new_tokens=16, **SAMPLERS[name]).token_ids == expected.token_ids
    chunks = list(stream_generate(there, "Hello", max_new_tokens=4, **SAMPLERS[name]))
    tokens = [chunk.token for chunk in chunks if chunk.token is not None]
    assert [token.logits is None for token in tokens] == [name in ("greedy", "top-k")] * 4
    assert [token.gate_mean for token in tokens] == pytest.approx(
        expected.gate_means[:4] if expected.gate_means else []
    )


def test_a_sampler_of_ones_own_gets_all_logits_of_a_device(tiny: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ON_DEVICE, "cpu", "cpu")
    there = load(tiny.artifact)
    seen: list[tuple[int, ...]] = []

    def second_best(logits: NDArray[np.float32]) -> NDArray[np.int64]:
        seen.append(logits.shape)
        return np.argsort(logits, -1)[:, -2]

    tokens = list(islice(generate_step(there.session, PROMPT, sampler=second_best), 3))
    assert seen == [(1, there.session.manifest.vocab_size)] * 3
    assert all(token.logits is not None and token.id == np.argsort(token.logits)[-2] for token in tokens)


def test_stop_strings_end_a_text_before_them(model: Model) -> None:
    whole = generate(model, "Hello", max_new_tokens=12)
    for start, end in ((0, 1), (3, 5), (len(whole.text) - 2, len(whole.text))):
        stop = whole.text[start:end]
        found = generate(model, "Hello", max_new_tokens=12, stop=stop)
        assert found.text == whole.text[: whole.text.index(stop)]
        assert (found.finish_reason, found.stopped_by) == ("stop", stop)
        assert found.token_ids == whole.token_ids[: len(found.token_ids)]
    assert generate(model, "Hello", max_new_tokens=12, stop=["\0"]).text == whole.text


def test_stop_tokens_are_not_part_of_the_text(model: Model) -> None:
    whole = generate(model, "Hello", max_new_tokens=12)
    stop = whole.token_ids[5]
    first = whole.token_ids.index(stop)
    found = generate(model, "Hello", max_new_tokens=12, stop_token_ids=[stop])
    assert found.token_ids == whole.token_ids[: first + 1]
    assert found.text == model.codec.decode(found.token_ids[:-1])
    assert (found.finish_reason, found.stopped_by) == ("stop", stop)
    longer = generate(model, "Hello", max_new_tokens=12, stop_token_ids=[stop], min_new_tokens=first + 3)
    assert stop not in longer.token_ids[: first + 2]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.3, "top_k": 3, "seed": 0}])
def test_log_probabilities_are_those_of_the_models_logits(
    model: Model, tiny: Exported, monkeypatch: pytest.MonkeyPatch, sampling: dict[str, Any]
) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 6, "logprobs": 4, **sampling}
    tokens = [chunk.token for chunk in stream_generate(model, "Hello", **settings) if chunk.token]
    for token in tokens:
        assert token.logits is not None
        assert token.top_logprobs is not None
        wide = token.logits.astype(np.float64)
        expected = wide - np.log(np.exp(wide).sum())
        order = np.argsort(-expected, kind="stable")[:4]
        assert token.logprob == pytest.approx(expected[token.id], abs=1e-5)
        assert [candidate.id for candidate in token.top_logprobs] == order.tolist()
        assert [candidate.logprob for candidate in token.top_logprobs] == pytest.approx(expected[order], abs=1e-5)
    monkeypatch.setitem(ON_DEVICE, "cpu", "cpu")
    there = generate(load(tiny.artifact), "Hello", **settings)
    assert there.token_ids == [token.id for token in tokens]
    assert there.logprobs == pytest.approx([token.logprob for token in tokens], abs=1e-5)
    assert [[candidate.id for candidate in token.top_logprobs or ()] for token in there.tokens] == [
        [candidate.id for candidate in token.top_logprobs or ()] for token in tokens
    ]


def test_penalties_and_biases_change_what_is_chosen_and_not_what_is_told(model: Model) -> None:
    plain = generate(model, "Hello", max_new_tokens=8, logprobs=1)
    biased = generate(model, "Hello", max_new_tokens=8, logprobs=1, logit_bias={plain.token_ids[0]: -np.inf})
    assert plain.token_ids[0] not in biased.token_ids
    assert biased.tokens[0].top_logprobs == plain.tokens[0].top_logprobs
    assert biased.tokens[0].logprob is not None
    assert biased.tokens[0].logprob < plain.tokens[0].top_logprobs[0].logprob  # type: ignore[index]
    once = generate(model, "Hello", max_new_tokens=40, no_repeat_ngram_size=1).token_ids
    assert len(set(once)) == len(once)


def test_processors_of_ones_own_come_last(model: Model) -> None:
    def only_nine(history: History, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        assert np.isneginf(logits[7])
        logits[:] = -np.inf
        logits[9] = 0
        return logits

    found = generate(model, "Hello", max_new_tokens=3, processors=[only_nine], logit_bias={7: -np.inf})
    assert found.token_ids == [9, 9, 9]
    with pytest.raises(PromptError, match="after 0 new tokens no token is allowed"):
        generate(model, "Hello", processors=[lambda history, logits: logits - np.inf])
    with pytest.raises(SettingsError, match=r"processors is .* must return logits, \(\d+,\)"):
        generate(model, "Hello", processors=[lambda history, logits: logits[:3]])


def test_an_echo_tells_of_the_prompt_and_changes_nothing_else(model: Model) -> None:
    plain = generate(model, PROMPT, max_new_tokens=6, logprobs=2)
    echoed = generate(model, PROMPT, max_new_tokens=6, logprobs=2, echo=True)
    assert echoed.token_ids == plain.token_ids
    assert plain.prompt is None
    assert echoed.prompt is not None
    assert [token.id for token in echoed.prompt] == PROMPT
    expected = model.session.prompt_logprobs(PROMPT, k=2)
    assert [token.logprob for token in echoed.prompt] == [None, *expected.logprobs.tolist()]
    for token, ids in zip(echoed.prompt[1:], expected.ids.tolist(), strict=True):
        assert [each.id for each in token.top_logprobs or ()] == ids
    (batched,) = generate_batch(model, [PROMPT], max_new_tokens=6, logprobs=2, echo=True)
    assert (batched.prompt, batched.token_ids) == (echoed.prompt, plain.token_ids)
    with pytest.raises(SettingsError, match="echo is True; it needs logprobs"):
        generate(model, PROMPT, echo=True)
    state = model.session.new_state()
    model.session.prefill(state, [PROMPT])
    with pytest.raises(PromptError, match="need a state of one row that has read nothing"):
        generate(model, PROMPT, logprobs=1, echo=True, state=state)


def test_a_trace_tells_what_each_memory_alone_would_say(model: Model) -> None:
    first = generate(model, PROMPT, max_new_tokens=1, trace=3).tokens[0]
    assert first.trace is not None
    told = {}
    for name, bias in (("blend", 0.0), ("base", 1e4), ("adapter", -1e4)):
        (alone,) = generate(model, PROMPT, max_new_tokens=1, logprobs=3, memory_bias=bias).tokens
        assert alone.top_logprobs is not None
        found = getattr(first.trace, name)
        assert [each.id for each in found] == [each.id for each in alone.top_logprobs]
        assert [each.logprob for each in found] == pytest.approx(
            [each.logprob for each in alone.top_logprobs], abs=1e-5
        )
        told[name] = found[0].logprob
    assert abs(told["base"] - told["adapter"]) > 1e-3
