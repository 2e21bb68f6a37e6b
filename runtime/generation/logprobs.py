"""Log-probabilities of a chosen token and of the likeliest ones."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..engine.likeliest import likeliest


class Candidate(NamedTuple):
    """A token that could come next. logprob: in nats, of the model itself: before temperature, penalties and masks."""

    id: int
    logprob: float

    @property
    def probability(self) -> float:
        """From 0 to 1."""
        return math.exp(self.logprob)


class Trace(NamedTuple):
    """What each memory alone, and their blend, would have said: the likeliest tokens of each, the likeliest first."""

    blend: tuple[Candidate, ...]
    base: tuple[Candidate, ...]
    adapter: tuple[Candidate, ...]


def log_normalizer(logits: NDArray[np.float32]) -> float:
    """The logarithm of the sum of exp(logits (vocab,)), in float32's steps."""
    largest = logits.max()
    table = logits - largest
    return float(largest) + math.log(float(np.exp(table, out=table).sum()))


def candidates(logits: NDArray[np.float32], count: int, normalizer: float | None = None) -> tuple[Candidate, ...]:
    """The `count` likeliest tokens of logits (vocab,)."""
    if not count:
        return ()
    normalizer = log_normalizer(logits) if normalizer is None else normalizer
    ids, values = likeliest(logits[None], min(count, len(logits)))
    return tuple(
        Candidate(token, value - normalizer) for token, value in zip(ids[0].tolist(), values[0].tolist(), strict=True)
    )
