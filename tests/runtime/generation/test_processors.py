"""Processors change logits as transformers' do, and go by the history alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers

from runtime import GenerationSettings, SettingsError
from runtime.generation.history import History
from runtime.generation.processors import make_processors

VOCAB = 40
GENERATOR = np.random.default_rng(3)
LOGITS = GENERATOR.normal(0, 3, VOCAB).astype(np.float32)
PROMPT, NEW = GENERATOR.integers(0, 3, 12).tolist(), GENERATOR.integers(0, 3, 20).tolist()


def history(prompt: list[int], new: list[int]) -> History:
    made = History(prompt)
    for token in new:
        made.append(token)
    return made


def changed(seen: History, **settings: Any) -> np.ndarray:
    logits = LOGITS.copy()
    for processor in make_processors(GenerationSettings(**settings), [1, 2], VOCAB):
        logits = processor(seen, logits)
    return logits


@pytest.mark.parametrize(
    ("settings", "theirs"),
    [
        ({"repetition_penalty": 1.7}, transformers.RepetitionPenaltyLogitsProcessor(1.7)),
        ({"repetition_penalty": 0.4}, transformers.RepetitionPenaltyLogitsProcessor(0.4)),
        ({"no_repeat_ngram_size": 1}, transformers.NoRepeatNGramLogitsProcessor(1)),
        ({"no_repeat_ngram_size": 2}, transformers.NoRepeatNGramLogitsProcessor(2)),
        ({"no_repeat_ngram_size": 3}, transformers.NoRepeatNGramLogitsProcessor(3)),
        (
            {"logit_bias": {3: 4.5, 7: -np.inf}},
            transformers.SequenceBiasLogitsProcessor([[[3], 4.5], [[7], -np.inf]]),
        ),
    ],
)
def test_a_processor_computes_what_transformers_does(settings: dict[str, Any], theirs: Any) -> None:
    for prompt, new in ((PROMPT, NEW), (PROMPT, []), ([5], []), ([5], [5, 5])):
        expected = theirs(torch.tensor([[*prompt, *new]]), torch.tensor(LOGITS[None]).clone())[0].numpy()
        assert not np.array_equal(expected, LOGITS) or len(prompt) == 1
        np.testing.assert_allclose(changed(history(prompt, new), **settings), expected, rtol=1e-6)


def test_presence_and_frequency_count_generated_tokens_alone() -> None:
    found = changed(history([3, 4], [5, 5, 6]), presence_penalty=0.5, frequency_penalty=0.25) - LOGITS
    np.testing.assert_allclose(found[[3, 4, 5, 6]], [0, 0, -1.0, -0.75], atol=1e-6)


def test_no_end_before_the_fewest_tokens() -> None:
    few, enough = history(PROMPT, NEW[:2]), history(PROMPT, NEW[:3])
    assert np.isneginf(changed(few, min_new_tokens=3)).nonzero()[0].tolist() == [1, 2]
    assert np.array_equal(changed(enough, min_new_tokens=3), LOGITS)


def test_a_history_that_became_shorter_is_what_it_was() -> None:
    seen = history(PROMPT, NEW)
    before = changed(seen, repetition_penalty=1.3, frequency_penalty=1.0, no_repeat_ngram_size=2)
    for token in (30, 31):
        seen.append(token)
    longer = changed(seen, repetition_penalty=1.3, frequency_penalty=1.0, no_repeat_ngram_size=2)
    seen.take_back(2)
    after = changed(seen, repetition_penalty=1.3, frequency_penalty=1.0, no_repeat_ngram_size=2)
    assert not np.array_equal(before, longer)
    assert np.array_equal(before, after)


def test_a_history_grows_beyond_its_first_room() -> None:
    seen = history([1, 2], list(range(1000)))
    assert seen.ids.tolist() == [1, 2, *range(1000)]
    assert seen.new.tolist() == list(range(1000))


@pytest.mark.parametrize("settings", [{"logit_bias": {40: 1.0}}, {"stop_token_ids": [3, 40], "min_new_tokens": 2}])
def test_a_token_that_the_model_lacks_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=r"(bias|ids) is 40; its tokens must be ids from 0 to 39"):
        changed(history([1], []), **settings)
