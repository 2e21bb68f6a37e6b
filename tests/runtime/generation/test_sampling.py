"""Samplers, by the distributions that they draw from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers

from runtime import SettingsError, greedy, make_sampler
from runtime.engine.likeliest import likeliest
from runtime.generation.sampling import RandomSampler

LOGITS = np.log(np.array([[0.5, 0.25, 0.15, 0.07, 0.03]], np.float32))


def drawn(count: int = 4000, **settings: Any) -> np.ndarray:
    """Relative frequencies of each token."""
    sampler = make_sampler(seed=0, **settings)
    return np.bincount([int(sampler(LOGITS)[0]) for _ in range(count)], minlength=5) / count


def test_temperature_zero_is_greedy() -> None:
    assert make_sampler(temperature=0.0, top_p=0.5, seed=3) is greedy
    assert list(greedy(np.array([[1, 3, 3], [5, 1, 2]], np.float32))) == [1, 0]


def test_temperature_one_draws_the_models_distribution() -> None:
    np.testing.assert_allclose(drawn(temperature=1.0), np.exp(LOGITS[0]), atol=0.03)


def test_temperature_sharpens() -> None:
    expected = np.exp(LOGITS[0] / 0.5)
    np.testing.assert_allclose(drawn(temperature=0.5), expected / expected.sum(), atol=0.03)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 2}, 2),
        ({"top_k": 9}, 5),
        ({"top_p": 0.5}, 1),
        ({"top_p": 0.6}, 2),
        ({"min_p": 0.4}, 2),
        ({"top_k": 4, "top_p": 0.8, "min_p": 0.4}, 2),
    ],
)
def test_filters_keep_the_likeliest_tokens_and_their_proportions(settings: dict[str, Any], kept: int) -> None:
    probabilities = np.exp(LOGITS[0, :kept])
    frequencies = drawn(temperature=1.0, **settings)
    np.testing.assert_allclose(frequencies[:kept], probabilities / probabilities.sum(), atol=0.03)
    assert frequencies[kept:].sum() == 0


def test_the_same_seed_draws_the_same_tokens() -> None:
    one, other = (make_sampler(temperature=1.0, seed=7) for _ in range(2))
    assert [int(one(LOGITS)[0]) for _ in range(50)] == [int(other(LOGITS)[0]) for _ in range(50)]


def test_rows_of_a_batch_are_drawn_apart() -> None:
    logits = np.array([[0, 50, 0], [50, 0, 0]], np.float32)
    assert list(make_sampler(temperature=1.0, seed=0)(logits)) == [1, 0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("temperature", float("nan")),
        ("temperature", 1e-320),
        ("top_k", -1),
        ("top_p", 0),
        ("top_p", float("nan")),
        ("min_p", 1),
        ("min_p", 2),
        ("seed", -1),
        ("seed", 1.5),
        ("temperature", "hot"),
        ("temperature", True),
    ],
)
def test_a_setting_outside_its_range_is_named(name: str, value: Any) -> None:
    with pytest.raises(SettingsError, match=f"{name} is"):
        make_sampler(**{name: value})


def test_settings_at_the_ends_of_their_ranges_have_one_meaning() -> None:
    assert list(make_sampler(1.0, top_p=1e-320, seed=0)(LOGITS)) == [0]
    assert list(make_sampler(1e-4, seed=0)(LOGITS)) == [0]
    assert drawn(temperature=1e308)[4] == pytest.approx(0.2, abs=0.03)
    assert drawn(temperature=1.0, min_p=1e-320)[4] > 0
    assert drawn(temperature=1.0, top_k=2**70)[4] > 0
    sampler, other = (make_sampler(1.0, seed=seed) for seed in (5, 2**64 + 5))
    assert [sampler(LOGITS)[0] for _ in range(40)] != [other(LOGITS)[0] for _ in range(40)]


WIDE = np.random.default_rng(0).normal(0, 2.5, (3, 5000)).astype(np.float32)
THEIRS: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "top_k": ({"top_k": 37}, [transformers.TopKLogitsWarper(37)]),
    "top_p": ({"top_p": 0.9}, [transformers.TopPLogitsWarper(0.9)]),
    "small top_p": ({"top_p": 0.02}, [transformers.TopPLogitsWarper(0.02)]),
    "min_p": ({"min_p": 0.03}, [transformers.MinPLogitsWarper(0.03)]),
    "typical_p": ({"typical_p": 0.4}, [transformers.TypicalLogitsWarper(0.4)]),
    "all": (
        {"top_k": 900, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.8},
        [
            transformers.TopKLogitsWarper(900),
            transformers.TopPLogitsWarper(0.95),
            transformers.MinPLogitsWarper(0.01),
            transformers.TypicalLogitsWarper(0.8),
        ],
    ),
}


@pytest.mark.parametrize("name", THEIRS)
def test_filters_leave_what_those_of_transformers_leave(name: str) -> None:
    settings, warpers = THEIRS[name]
    left = torch.tensor(WIDE.copy()) / 0.8
    for warper in warpers:
        left = warper(torch.zeros(3, 1, dtype=torch.long), left)
    for row, expected in zip(WIDE, torch.softmax(left.double(), -1).numpy(), strict=True):
        sampler = make_sampler(0.8, seed=0, **settings)
        assert isinstance(sampler, RandomSampler)
        filters = sampler.filters
        first = [table[0] for table in likeliest(row[None], filters.top_k)] if filters.top_k else [None, row]
        ids, weights = filters.kept(*first)
        found = np.zeros(len(row))
        found[slice(None) if ids is None else ids] = weights / weights.sum()
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert 0 < np.count_nonzero(expected) < len(row)


def test_top_n_sigma_keeps_what_is_within_deviations_of_the_highest() -> None:
    row = WIDE[:1]
    kept = row >= row.max() - 1.5 * row.std(dtype=np.float64)
    tokens = {int(make_sampler(5.0, seed=seed, top_n_sigma=1.5)(row)[0]) for seed in range(300)}
    assert tokens <= set(np.flatnonzero(kept))
    assert len(tokens) > 0.5 * min(kept.sum(), 300)
    with_top_k = {int(make_sampler(5.0, 10**3, seed=seed, top_n_sigma=1.5)(row)[0]) for seed in range(300)}
    assert with_top_k <= set(np.flatnonzero(kept))


@pytest.mark.parametrize("k", [1, 2, 50, 77, 78, 79, 4000, 5000])
def test_the_likeliest_tokens_are_those_of_a_sort_the_lowest_id_first(k: int) -> None:
    rows = np.round(WIDE)  # with many ties
    rows[2, 7:3000] = -np.inf
    ids, values = likeliest(rows, k)
    expected = np.argsort(-rows, -1, kind="stable")[:, :k]
    assert np.array_equal(ids, expected)
    assert np.array_equal(values, np.take_along_axis(rows, expected, -1))
