"""Guesses at what comes next: what followed the last tokens where they stood before in the text (prompt lookup,
https://github.com/apoorvumang/prompt-lookup-decoding).

Knows nothing about graphs: `ahead` feeds them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..checks import whole_number
from ..engine.marks import MOST_TOKENS

MOST_DRAFTED = MOST_TOKENS - 1
"""Tokens of a draft; a chosen one is fed before it."""
NGRAMS = (3, 2)
"""Tokens that must stand before a draft in the same order, the most telling first."""
FIRST_CHANCE, FIRST_DRAFT = 0.5, 2
"""How often a draft's next token is taken to be accepted, and its tokens, before anything was measured."""
RATE = 0.15
"""How fast chances and times follow what is measured."""
PATIENCE, MOST_PATIENCE = 8, 64
"""How many drafts that would not pay are left out before one is tried, twice as many after a failure."""


class Speculation:
    """Drafts for one text, and whether they pay, by what is measured: the seconds of a pass, and how often a draft's
    next token is accepted.

    most: tokens of a draft. drafted, accepted: their number so far. passes: how many runs fed drafts.
    """

    def __init__(self, most: int) -> None:
        """Raises SettingsError for another number than 1 to `MOST_DRAFTED`."""
        self.most = whole_number("speculate", most, 1, MOST_DRAFTED)
        self.drafted = self.accepted = self.passes = 0
        self._chances = dict.fromkeys(NGRAMS, FIRST_CHANCE)
        self._patience = dict.fromkeys(NGRAMS, PATIENCE)
        self._left_out = dict.fromkeys(NGRAMS, 0)
        self._by = NGRAMS[0]  # what the present draft was found by
        self._seconds: dict[int, float] = {}  # by how many tokens were fed

    def draft(self, ids: NDArray[np.int64], room: int) -> list[int]:
        """What may follow `ids`, (N,), at most `room` tokens; nothing where it would not pay, and before a step alone
        was timed."""
        most = min(self.most, room)
        if 1 not in self._seconds or most < 1:
            return []
        for ngram in NGRAMS:
            found = followers(ids, ngram, most)
            if found:
                self._by = ngram
                return found[: self._worth(ngram, len(found))]
        return []

    def timed(self, tokens: int, seconds: float) -> None:
        """Note how long it took to feed so many tokens."""
        self._seconds[tokens] = _followed(self._seconds.get(tokens), seconds)
        if tokens > 1:
            self.passes += 1
            self.drafted += tokens - 1

    def judged(self, accepted: bool) -> None:
        """Note whether a token of the draft was chosen, of each up to the first that was not."""
        by = self._by
        self.accepted += accepted
        self._chances[by] = _followed(self._chances[by], float(accepted))
        self._patience[by] = PATIENCE if accepted else min(2 * self._patience[by], MOST_PATIENCE)

    def _worth(self, ngram: int, most: int) -> int:
        """How many tokens of a draft give the most tokens a second; now and then one, where none does."""
        if len(self._seconds) == 1:
            return min(most, FIRST_DRAFT)
        chance = self._chances[ngram]
        kept = np.concatenate([[1.0], np.cumprod(np.full(most, chance))]).cumsum()  # 1 + chance + chance^2 + ...
        best = int((kept / self._costs(most)).argmax())
        if best:
            return best
        self._left_out[ngram] += 1
        if self._left_out[ngram] < self._patience[ngram]:
            return 0
        self._left_out[ngram] = 0
        return 1

    def _costs(self, most: int) -> NDArray[np.float64]:
        """Seconds of passes with 0 to `most` drafted tokens: as measured, and on a line where they were not."""
        known = sorted(self._seconds)
        seconds = np.array([self._seconds[tokens] for tokens in known])
        wanted = np.arange(1, most + 2)
        further = max(0.0, float(seconds[-1] - seconds[0])) / (known[-1] - known[0])
        return np.asarray(np.interp(wanted, known, seconds) + further * np.maximum(0, wanted - known[-1]))


def followers(ids: NDArray[np.int64], ngram: int, most: int) -> list[int]:
    """Up to `most` tokens that followed the last `ngram` ones where these last stood before; none if they did not."""
    count = len(ids) - ngram  # places before the last one
    if count < 1:
        return []
    same = np.ones(count, bool)
    for offset in range(ngram):
        same &= ids[offset : offset + count] == ids[count + offset]
    places = np.flatnonzero(same)
    if not len(places):
        return []
    first = int(places[-1]) + ngram
    return [int(token) for token in ids[first : first + most]]


def _followed(known: float | None, found: float) -> float:
    return found if known is None else known + RATE * (found - known)
