"""The quality gate: numbers that can be worked out by hand, and data files that it refuses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from export.errors import ExportError, VerificationError
from export.verification.quality import (
    QualityReport,
    measure_quality,
    quality_warnings,
)
from imsm_core.data.dataset import QUERY_TOKENS, Example, plain_example

Array = NDArray[Any]
VOCABULARY = 5


def random_logits(seed: int, scale: float = 1.0) -> dict[int, Array]:
    """By the length N of an answer, (N, VOCABULARY) float32."""
    generator = np.random.default_rng(seed)
    sizes = range(1, 400)
    return {size: scale * generator.normal(size=(size, VOCABULARY)).astype(np.float32) for size in sizes}


def random_texts(*lengths: int) -> list[Example]:
    generator = np.random.default_rng(7)
    return [plain_example([int(token) for token in generator.integers(0, VOCABULARY, size)]) for size in lengths]


def test_a_model_agrees_with_itself() -> None:
    logits = random_logits(0)
    report = measure_quality(
        lambda text: logits[len(text.answer_ids)], lambda text: logits[len(text.answer_ids)], random_texts(2, 30, 300)
    )
    assert report.argmax_agreement == 1
    assert report.mean_kl == report.perplexity_change == 0
    assert report.perplexity == report.perplexity_reference
    assert report.texts == 3
    assert report.tokens == 1 + (30 - QUERY_TOKENS) + (300 - QUERY_TOKENS)


def test_numbers_equal_those_of_the_definitions() -> None:
    reference, found, texts = (
        random_logits(0),
        random_logits(1),
        [*random_texts(300, 12, 3), Example([1, 2, 3, 4] * 5, [0, 2])],
    )
    report = measure_quality(
        lambda text: reference[len(text.answer_ids)], lambda text: found[len(text.answer_ids)], texts
    )
    kl, losses, same = [], [], []
    for text in texts:
        for place, token in enumerate(text.answer_ids):
            p, q = (np.exp(side[len(text.answer_ids)][place].astype(np.float64)) for side in (reference, found))
            p, q = p / p.sum(), q / q.sum()
            kl.append(float((p * np.log(p / q)).sum()))
            losses.append([-math.log(side[token]) for side in (p, q)])
            same.append(p.argmax() == q.argmax())
    before, after = np.exp(np.mean(losses, axis=0))
    assert report.mean_kl == pytest.approx(np.mean(kl))
    assert report.argmax_agreement == pytest.approx(np.mean(same))
    assert report.perplexity_reference == pytest.approx(before)
    assert report.perplexity == pytest.approx(after)
    assert report.perplexity_change == pytest.approx(after / before - 1)


def test_large_logits_do_not_overflow() -> None:
    near, far = random_logits(0, 1e4), random_logits(1, 1e4)
    report = measure_quality(
        lambda text: near[len(text.answer_ids)], lambda text: far[len(text.answer_ids)], random_texts(40)
    )
    assert all(math.isfinite(value) for value in report.as_dict().values())
    assert report.mean_kl > 1


def test_a_constant_added_to_the_logits_keeps_the_distribution() -> None:
    logits = random_logits(0)
    report = measure_quality(
        lambda text: logits[len(text.answer_ids)], lambda text: logits[len(text.answer_ids)] + 100, random_texts(40)
    )
    assert report.mean_kl == pytest.approx(0, abs=1e-9)
    assert report.perplexity_change == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("broken", ["nan", "rows", "vocabulary"])
def test_broken_logits_are_an_error(broken: str) -> None:
    logits = random_logits(0)

    def found(text: Example) -> Array:
        array = logits[len(text.answer_ids)].copy()
        if broken == "nan":
            array[-2, 1] = np.nan
        return array[:-1] if broken == "rows" else array[:, :-1] if broken == "vocabulary" else array

    with pytest.raises(VerificationError, match="not finite" if broken == "nan" else "logits are"):
        measure_quality(lambda text: logits[len(text.answer_ids)], found, random_texts(20))


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(ExportError, match="no texts"):
        measure_quality(lambda text: np.zeros((1, 2)), lambda text: np.zeros((1, 2)), [])


def report_of(change: float, tokens: int = 5000) -> QualityReport:
    return QualityReport(10, tokens, 0.9, 0.1, 4.0, 4.0 * (1 + change), change)


def test_warnings_say_what_is_past_the_threshold() -> None:
    assert quality_warnings(report_of(0.019), 0.02) == []
    assert quality_warnings(report_of(-0.5), 0.02) == []
    (warning,) = quality_warnings(report_of(0.031), 0.02)
    assert "3.1%" in warning
    assert "2.0%" in warning
    assert len(quality_warnings(report_of(math.nan), 0.02)) == 1
    (few,) = quality_warnings(report_of(0.0, tokens=10), 0.02)
    assert "10 tokens" in few


def test_a_measurement_reports_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, lines = random_logits(0), list[str]()
    clock = iter([100.0, 100.0, 105.0, 111.0, 112.0, 125.0])
    monkeypatch.setattr("export.verification.quality.time.monotonic", lambda: next(clock))
    measure_quality(
        lambda text: logits[len(text.answer_ids)],
        lambda text: logits[len(text.answer_ids)],
        random_texts(20, 20, 30, 9, 9),
        lines.append,
    )
    assert lines == [
        "quality   measuring on 5 texts of 88 tokens, 48 of which are judged",
        "quality   2 of 5 texts after 11 s",
        "quality   4 of 5 texts after 25 s",
    ]
