"""Choosing the next token: callables from logits (B, vocab) float32 to token ids (B,) int64.

Greedy and top-k choose from the likeliest tokens alone, which a provider with its own memory finds there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checks import typed
from ..engine.likeliest import likeliest
from ..errors import ArtifactError, SettingsError

LEAST_TEMPERATURE = 1e-4
"""Below it logits that differ by anything at all differ by more than float64 holds."""
Sampler = Callable[[NDArray[np.float32]], NDArray[np.int64]]


def greedy(logits: NDArray[np.float32]) -> NDArray[np.int64]:
    """The most likely token of each row; the first on a tie. Raises as the samplers of `make_sampler`."""
    return np.asarray(_table(logits).argmax(-1), np.int64)


class RandomSampler:
    """Draws from what the filters leave. top_k: how many of the likeliest tokens it draws from; 0: all."""

    def __init__(self, temperature: float, top_k: int, top_p: float, min_p: float, seed: int | None) -> None:
        self.temperature, self.top_k, self.top_p, self.min_p = temperature, top_k, top_p, min_p
        self.generator = np.random.default_rng(seed)

    def __call__(self, logits: NDArray[np.float32]) -> NDArray[np.int64]:
        """Token ids (B,) for logits (B, vocab)."""
        logits = _table(logits)
        if 0 < self.top_k < logits.shape[-1]:
            return self.choose(*likeliest(logits, self.top_k))
        return self.choose(np.broadcast_to(np.arange(logits.shape[-1]), logits.shape), logits)

    def choose(self, ids: NDArray[np.int64], logits: NDArray[np.float32]) -> NDArray[np.int64]:
        """Token ids (B,) from these alone, both (B, k)."""
        return np.array([self._row(*row) for row in zip(ids, logits, strict=True)], np.int64)

    def _row(self, kept: NDArray[Any], logits: NDArray[Any]) -> int:
        scaled = logits.astype(np.float64) / self.temperature
        probabilities = np.exp(scaled - scaled.max())
        probabilities /= probabilities.sum()
        if self.top_p < 1:
            order = np.argsort(-probabilities, kind="stable")
            before = np.cumsum(probabilities[order]) - probabilities[order]
            order = order[before < self.top_p]  # the token that crosses p is kept, so at least one is
            kept, probabilities = kept[order], probabilities[order]
        if self.min_p > 0:
            likely = probabilities >= self.min_p * probabilities.max()
            kept, probabilities = kept[likely], probabilities[likely]
        return int(self.generator.choice(kept, p=probabilities / probabilities.sum()))


def make_sampler(
    temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, seed: int | None = None
) -> Sampler:
    """A sampler. temperature 0 is greedy. The filters apply after the temperature, in this order:

    top_k: keep the k likeliest tokens (0: all). top_p: keep the likeliest tokens whose probabilities first add up to
    p (1: all). min_p: keep tokens at least min_p times as likely as the likeliest (0: all). seed: None differs from
    run to run. Raises SettingsError for a value of another type or outside its range. The sampler raises SettingsError
    for what are no logits (B, vocab), and ArtifactError for logits that are not finite (-inf masks a token).
    """
    temperature = typed("temperature", temperature, float)
    top_k = typed("top_k", top_k, int)
    top_p = typed("top_p", top_p, float)
    min_p = typed("min_p", min_p, float)
    seed = typed("seed", seed, int | None)
    _check_ranges(temperature, top_k, top_p, min_p, seed)
    return greedy if temperature == 0 else RandomSampler(temperature, top_k, top_p, min_p, seed)


def likeliest_needed(sampler: Sampler, vocab: int) -> int | None:
    """How many of the likeliest tokens a sampler chooses from; None if it wants all logits."""
    if sampler is greedy:
        return 1
    if isinstance(sampler, RandomSampler) and 0 < sampler.top_k < vocab:
        return sampler.top_k
    return None


def _table(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    if not isinstance(logits, np.ndarray) or logits.ndim != 2 or not logits.shape[1] or logits.dtype.kind != "f":
        raise SettingsError("logits", logits, "they must be an array (B, vocab) of floating-point numbers")
    if not np.isfinite(logits.max(-1)).all():  # NumPy takes "not a number" for the largest
        raise ArtifactError("the logits are not finite, so that no token can be chosen")
    return logits


def _check_ranges(temperature: float, top_k: int, top_p: float, min_p: float, seed: int | None) -> None:
    if not (temperature == 0 or LEAST_TEMPERATURE <= temperature < math.inf):
        raise SettingsError("temperature", temperature, f"it must be 0 (greedy) or at least {LEAST_TEMPERATURE}")
    if top_k < 0:
        raise SettingsError("top_k", top_k, "it must be 0 (off) or above")
    if not 0 < top_p <= 1:
        raise SettingsError("top_p", top_p, "it must be in (0, 1]")
    if not 0 <= min_p < 1:
        raise SettingsError("min_p", min_p, "it must be in [0, 1)")
    if seed is not None and seed < 0:
        raise SettingsError("seed", seed, "it must be 0 or above")
