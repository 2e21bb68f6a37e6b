"""Choosing the next token: callables from logits (B, vocab) float32 to token ids (B,) int64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import SettingsError

LEAST_TEMPERATURE = 1e-4
"""Below it logits that differ by anything at all differ by more than float64 holds."""
Sampler = Callable[[NDArray[np.float32]], NDArray[np.int64]]


def greedy(logits: NDArray[np.float32]) -> NDArray[np.int64]:
    """The most likely token of each row; the first on a tie."""
    return np.asarray(logits.argmax(-1), np.int64)


def make_sampler(
    temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, seed: int | None = None
) -> Sampler:
    """A sampler. temperature 0 is greedy. The filters apply after the temperature, in this order:

    top_k: keep the k likeliest tokens (0: all). top_p: keep the likeliest tokens whose probabilities first add up to
    p (1: all). min_p: keep tokens at least min_p times as likely as the likeliest (0: all). seed: None differs from
    run to run. Raises SettingsError for a value outside its range.
    """
    check_sampling(temperature, top_k, top_p, min_p, seed)
    if temperature == 0:
        return greedy
    generator = np.random.default_rng(seed)

    def sample(logits: NDArray[np.float32]) -> NDArray[np.int64]:
        rows = [_sample_row(row, temperature, top_k, top_p, min_p, generator) for row in logits]
        return np.array(rows, np.int64)

    return sample


def check_sampling(temperature: float, top_k: int, top_p: float, min_p: float, seed: int | None) -> None:
    """Raise SettingsError for a value outside its range."""
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


def _sample_row(
    logits: NDArray[np.float32], temperature: float, top_k: int, top_p: float, min_p: float, generator: Any
) -> int:
    kept = np.arange(len(logits))
    if 0 < top_k < len(logits):
        kept = np.argpartition(logits, -top_k)[-top_k:]
    scaled = logits[kept].astype(np.float64) / temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    if top_p < 1:
        order = np.argsort(-probabilities, kind="stable")
        before = np.cumsum(probabilities[order]) - probabilities[order]
        order = order[before < top_p]  # the token that crosses p is kept, so at least one is
        kept, probabilities = kept[order], probabilities[order]
    if min_p > 0:
        likely = probabilities >= min_p * probabilities.max()
        kept, probabilities = kept[likely], probabilities[likely]
    return int(generator.choice(kept, p=probabilities / probabilities.sum()))
