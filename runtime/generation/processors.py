"""Changing logits before a token is chosen: callables from a history and its logits (vocab,) to logits (vocab,).

A processor may write into the logits that it is given: they are the chooser's own copy. It goes by the history alone,
which may be shorter than it was at the last call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import SettingsError
from .history import History

if TYPE_CHECKING:
    from .settings import GenerationSettings

Logits = NDArray[np.float32]
Processor = Callable[[History, Logits], Logits]


class RepetitionPenalty:
    """Logits of tokens that are in the text, the prompt included: divided by `penalty` where positive, else multiplied
    (CTRL, arXiv 1909.05858, section 4.1; as transformers does)."""

    def __init__(self, penalty: float) -> None:
        self.penalty = np.float32(penalty)

    def __call__(self, history: History, logits: Logits) -> Logits:
        seen = np.unique(history.ids)
        found = logits[seen]
        logits[seen] = np.where(found > 0, found / self.penalty, found * self.penalty)
        return logits


class CountPenalty:
    """Logits of generated tokens minus `presence`, and minus `frequency` for each time that they came (as OpenAI's API
    defines its penalties)."""

    def __init__(self, presence: float, frequency: float) -> None:
        self.presence, self.frequency = np.float32(presence), np.float32(frequency)

    def __call__(self, history: History, logits: Logits) -> Logits:
        seen, counts = np.unique(history.new, return_counts=True)
        logits[seen] -= self.presence + self.frequency * counts.astype(np.float32)
        return logits


class NoRepeatNgram:
    """No n-gram of tokens comes twice in a text, the prompt included (as transformers does)."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, history: History, logits: Logits) -> Logits:
        ids, before = history.ids, self.size - 1
        if len(ids) < self.size:
            return logits
        windows = np.lib.stride_tricks.sliding_window_view(ids, self.size)
        same = (windows[:, :before] == ids[len(ids) - before :]).all(-1)
        logits[windows[same, before]] = -np.inf
        return logits


class LogitBias:
    """Adds a number to the logits of some tokens; -infinity forbids one."""

    def __init__(self, bias: Mapping[int, float]) -> None:
        self.ids = np.array(list(bias), np.int64)
        self.bias = np.array(list(bias.values()), np.float32)

    def __call__(self, history: History, logits: Logits) -> Logits:
        logits[self.ids] += self.bias
        return logits


class MinNewTokens:
    """No token of `ends` before `count` tokens were generated."""

    def __init__(self, count: int, ends: Sequence[int]) -> None:
        self.count = count
        self.ends = np.array(sorted(ends), np.int64)

    def __call__(self, history: History, logits: Logits) -> Logits:
        if len(history.new) < self.count:
            logits[self.ends] = -np.inf
        return logits


def make_processors(settings: GenerationSettings, ends: Sequence[int], vocab: int) -> list[Processor]:
    """The processors that settings describe, in the order in which they work; constraints are not among them. ends:
    tokens that end a text. vocab: how many tokens there are. Raises SettingsError for a token outside of them."""
    for name in ("logit_bias", "stop_token_ids"):
        if outside := [token for token in getattr(settings, name) or () if not 0 <= token < vocab]:
            raise SettingsError(name, outside[0], f"its tokens must be ids from 0 to {vocab - 1}")
    found: list[Processor] = []
    if settings.logit_bias:
        found.append(LogitBias(settings.logit_bias))
    if settings.repetition_penalty != 1:
        found.append(RepetitionPenalty(settings.repetition_penalty))
    if settings.presence_penalty or settings.frequency_penalty:
        found.append(CountPenalty(settings.presence_penalty, settings.frequency_penalty))
    if settings.no_repeat_ngram_size:
        found.append(NoRepeatNgram(settings.no_repeat_ngram_size))
    if settings.min_new_tokens:
        found.append(MinNewTokens(settings.min_new_tokens, ends))
    return found
