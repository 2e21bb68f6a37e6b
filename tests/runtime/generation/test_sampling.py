"""Samplers, by the distributions that they draw from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from runtime import SettingsError, greedy, make_sampler

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
