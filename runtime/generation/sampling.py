"""Choosing the next token: callables from logits (B, vocab) float32 to token ids (B,) int64.

Greedy and top-k choose from the likeliest tokens alone, which a provider with its own memory finds there. No filter
sorts a whole vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checks import check_fields, typed
from ..engine.likeliest import among_largest, likeliest
from ..errors import ArtifactError, SettingsError

Array = NDArray[Any]
LEAST_TEMPERATURE = 1e-4
"""Below it logits that differ by anything at all differ by more than float64 holds."""
BLOCK = 256
"""Weights whose sum is looked at first where one is drawn."""
FIRST_LOOK = 256
"""Tokens that a filter by mass looks at first; most distributions need no more."""
Sampler = Callable[[NDArray[np.float32]], NDArray[np.int64]]


def greedy(logits: NDArray[np.float32]) -> NDArray[np.int64]:
    """The most likely token of each row; the first on a tie. Raises as the samplers of `make_sampler`."""
    return np.asarray(_table(logits).argmax(-1), np.int64)


@dataclass(frozen=True)
class Filters:
    """What is left to draw from, as `make_sampler` explains it."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    top_n_sigma: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        if not (self.temperature == 0 or LEAST_TEMPERATURE <= self.temperature < math.inf):
            rule = f"it must be 0 (greedy) or at least {LEAST_TEMPERATURE}"
            raise SettingsError("temperature", self.temperature, rule)
        if self.top_k < 0:
            raise SettingsError("top_k", self.top_k, "it must be 0 (off) or above")
        for name in ("top_p", "typical_p"):
            if not 0 < getattr(self, name) <= 1:
                raise SettingsError(name, getattr(self, name), "it must be in (0, 1]")
        if not 0 <= self.min_p < 1:
            raise SettingsError("min_p", self.min_p, "it must be in [0, 1)")
        if not 0 <= self.top_n_sigma < math.inf:
            raise SettingsError("top_n_sigma", self.top_n_sigma, "it must be 0 (off) or above")

    def lowest(self, logits: Array) -> float:
        """The logit below which `top_n_sigma` leaves tokens of all `logits` (vocab,) out."""
        if not self.top_n_sigma:
            return -math.inf
        held = logits if math.isfinite(logits.min()) else logits[np.isfinite(logits)]
        away = held - held.mean()
        return float(logits.max()) - self.top_n_sigma * math.sqrt(float(away @ away) / len(held))

    def kept(self, ids: Array | None, logits: Array) -> tuple[Array | None, Array]:
        """Token ids that the filters by probability leave, and their weights (N,). ids: which tokens the logits (N,)
        are of; None: all, in their order, as it also is in the result."""
        weights = logits.astype(np.float64)
        weights /= self.temperature
        weights -= weights.max()
        np.exp(weights, out=weights)
        if self.top_p < 1:
            order = _until_mass(weights, weights, self.top_p * weights.sum())
            ids, weights = _chosen(ids, weights, order)
        if self.min_p > 0:
            ids, weights = _chosen(ids, weights, weights >= self.min_p * weights.max())
        if self.typical_p < 1:
            ids, weights = _chosen(ids, weights, _typical(weights, self.typical_p))
        return ids, weights


class RandomSampler:
    """Draws from what the filters leave."""

    def __init__(self, filters: Filters, seed: int | None) -> None:
        self.filters = filters
        self.generator = np.random.default_rng(seed)

    def likeliest_needed(self, vocab: int) -> int | None:
        """How many of the likeliest tokens it chooses from; None if it wants all logits."""
        wanted = self.filters.top_k
        return wanted if 0 < wanted < vocab and not self.filters.top_n_sigma else None

    def __call__(self, logits: NDArray[np.float32]) -> NDArray[np.int64]:
        """Token ids (B,) for logits (B, vocab)."""
        return np.array([self._row(row) for row in _table(logits)], np.int64)

    def choose(self, ids: NDArray[np.int64], logits: NDArray[np.float32]) -> NDArray[np.int64]:
        """Token ids (B,) from the likeliest tokens alone, both (B, k): what is left after `top_k`."""
        return np.array([self._draw(*self.filters.kept(*row)) for row in zip(ids, logits, strict=True)], np.int64)

    def _row(self, logits: NDArray[np.float32]) -> int:
        lowest = self.filters.lowest(logits)
        if 0 < self.filters.top_k < len(logits):
            found, table = likeliest(logits[None], self.filters.top_k)
            ids, values = found[0], table[0]
            enough = max(1, int(np.count_nonzero(values >= lowest)))  # the likeliest come first
            return self._draw(*self.filters.kept(ids[:enough], values[:enough]))
        if lowest == -math.inf:
            return self._draw(*self.filters.kept(None, logits))
        ids = np.flatnonzero(logits >= lowest)
        return self._draw(*self.filters.kept(ids, logits[ids]))

    def _draw(self, ids: Array | None, weights: Array) -> int:
        index = _drawn(weights, self.generator.random())
        return index if ids is None else int(ids[index])


def _drawn(weights: Array, chance: float) -> int:
    """The index whose weight a chance from 0 to 1 falls on. Sums of blocks first: a running sum of a whole vocabulary
    would take longer than everything else."""
    starts = np.arange(0, len(weights), BLOCK)
    sums = np.cumsum(np.add.reduceat(weights, starts))
    wanted = chance * sums[-1]
    block = int(np.searchsorted(sums, wanted, side="right"))
    if block < len(sums):
        start = int(starts[block])
        before = sums[block - 1] if block else 0.0
        inside = np.cumsum(weights[start : start + BLOCK])
        index = start + int(np.searchsorted(inside, wanted - before, side="right"))
        if index < min(start + BLOCK, len(weights)) and weights[index] > 0:
            return index
    return int(np.flatnonzero(weights[: (block + 1) * BLOCK])[-1])  # rounding reached the sum itself


def make_sampler(
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | None = None,
    typical_p: float = 1.0,
    top_n_sigma: float = 0.0,
) -> Sampler:
    """A sampler. temperature 0 is greedy. What the filters leave is drawn from; they apply in this order, the last
    three to probabilities after the temperature, of what the ones before have left:

    top_n_sigma: keep tokens whose logit is at most n standard deviations of all logits below the highest
    (arXiv 2411.07641; 0: all). top_k: keep the k likeliest tokens (0: all). top_p: keep the likeliest tokens whose
    probabilities first add up to p (1: all). min_p: keep tokens at least min_p times as likely as the likeliest (0:
    all). typical_p: keep the tokens whose surprise is nearest to the entropy, until they add up to p (arXiv 2202.00666;
    1: all). seed: None differs from run to run; with one, the same logits give the same tokens on any machine.

    Raises SettingsError for a value of another type or outside its range. The sampler raises SettingsError
    for what are no logits (B, vocab), and ArtifactError for logits that are not finite (-inf masks a token).
    """
    filters = Filters(temperature, top_k, top_p, min_p, typical_p, top_n_sigma)
    seed = typed("seed", seed, int | None)
    if seed is not None and seed < 0:
        raise SettingsError("seed", seed, "it must be 0 or above")
    return greedy if filters.temperature == 0 else RandomSampler(filters, seed)


def likeliest_needed(sampler: Sampler, vocab: int) -> int | None:
    """How many of the likeliest tokens a sampler chooses from; None if it wants all logits."""
    if sampler is greedy:
        return 1
    return sampler.likeliest_needed(vocab) if isinstance(sampler, RandomSampler) else None


def _until_mass(worth: Array, weights: Array, mass: float) -> Array:
    """Indices by descending worth, equal ones in their order, up to the one with which their weights reach `mass`; at
    least one, and all if they do not."""
    count = FIRST_LOOK
    while True:
        found = among_largest(worth, count)
        found = found[np.argsort(-worth[found], kind="stable")]
        before = np.cumsum(weights[found]) - weights[found]
        if len(found) == len(worth) or before[-1] >= mass:
            return found[before < mass]
        count *= 8


def _typical(weights: Array, mass: float) -> Array:
    """Indices of the tokens whose surprise is nearest to the entropy and whose probabilities add up to `mass`."""
    probabilities = weights / weights.sum()
    surprise = np.full(len(weights), np.inf)
    np.negative(np.log(probabilities, where=probabilities > 0, out=surprise), where=probabilities > 0, out=surprise)
    possible = probabilities > 0
    entropy = float(probabilities[possible] @ surprise[possible])
    return np.sort(_until_mass(-np.abs(surprise - entropy), probabilities, mass))


def _chosen(ids: Array | None, weights: Array, which: Array) -> tuple[Array, Array]:
    """Some of the tokens: by a mask, or by their indices."""
    indices = np.flatnonzero(which) if which.dtype == bool else which
    return indices if ids is None else ids[indices], weights[indices]


def _table(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    if not isinstance(logits, np.ndarray) or logits.ndim != 2 or not logits.shape[1] or logits.dtype.kind != "f":
        raise SettingsError("logits", logits, "they must be an array (B, vocab) of floating-point numbers")
    if not np.isfinite(logits.max(-1)).all():  # NumPy takes "not a number" for the largest
        raise ArtifactError("the logits are not finite, so that no token can be chosen")
    return logits
