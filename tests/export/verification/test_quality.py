"""The quality gate: numbers that can be worked out by hand, and data files that it refuses."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from export.errors import ExportError, VerificationError
from export.verification.quality import (
    Difference,
    QualityReport,
    Side,
    in_pieces,
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


def side(**memories: dict[int, Array]) -> Side:
    """A model of these logits, by who speaks."""
    return lambda text: in_pieces(
        {name: logits[len(text.answer_ids)] for name, logits in memories.items()}, len(text.answer_ids)
    )


def of_base(report: QualityReport) -> Difference:
    assert report.base is not None
    return report.base


def test_a_model_agrees_with_itself() -> None:
    logits = random_logits(0)
    report = measure_quality(side(base=logits), side(base=logits), random_texts(2, 30, 300))
    found = of_base(report)
    assert found.argmax_agreement == 1
    assert found.mean_kl == found.perplexity_change == 0
    assert found.perplexity == found.perplexity_reference
    assert report.texts == 3
    assert report.tokens == 1 + (30 - QUERY_TOKENS) + (300 - QUERY_TOKENS)


def test_numbers_equal_those_of_the_definitions() -> None:
    reference, found, texts = (
        random_logits(0),
        random_logits(1),
        [*random_texts(300, 12, 3), Example([1, 2, 3, 4] * 5, [0, 2])],
    )
    report = of_base(measure_quality(side(base=reference), side(base=found), texts))
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
    report = of_base(measure_quality(side(base=near), side(base=far), random_texts(40)))
    assert all(math.isfinite(value) for value in asdict(report).values())
    assert report.mean_kl > 1


def test_a_constant_added_to_the_logits_keeps_the_distribution() -> None:
    logits = random_logits(0)
    higher = {size: array + 100 for size, array in logits.items()}
    report = of_base(measure_quality(side(base=logits), side(base=higher), random_texts(40)))
    assert report.mean_kl == pytest.approx(0, abs=1e-9)
    assert report.perplexity_change == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("broken", ["nan", "rows", "vocabulary"])
def test_broken_logits_are_an_error(broken: str) -> None:
    logits = random_logits(0)

    def damaged(array: Array) -> Array:
        array = array.copy()
        if broken == "nan":
            array[-1, 1] = np.nan
        return array[:-1] if broken == "rows" else array[:, :-1] if broken == "vocabulary" else array

    wrong = {size: damaged(array) for size, array in logits.items()}

    with pytest.raises(VerificationError, match="not finite" if broken == "nan" else "logits are"):
        measure_quality(side(blend=logits, base=logits), side(blend=logits, base=wrong), random_texts(20))


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(ExportError, match="no texts"):
        measure_quality(side(base={}), side(base={}), [])


def test_blend_and_memories_are_measured_apart() -> None:
    texts, reference, other, third = random_texts(20, 90), *(random_logits(seed) for seed in range(3))
    apart = [of_base(measure_quality(side(base=reference), side(base=found), texts)) for found in (other, third)]
    expected = side(blend=reference, base=reference, adapter=reference)
    report = measure_quality(expected, side(blend=other, base=third, adapter=reference), texts)
    assert (report.blend, report.base) == tuple(apart)
    assert report.adapter is not None
    assert report.adapter.mean_kl == 0
    assert report.tokens == 12 + 82
    alone = measure_quality(expected, side(base=third), texts)
    assert alone.measured == {"base": report.base}
    assert alone.as_dict(Path("folder/held.jsonl"))["file"] == "held.jsonl"
    assert alone.as_dict(None)["blend"] is None


def report_of(tokens: int = 5000, **changes: float) -> QualityReport:
    """changes: of the perplexity, by who speaks; 0 where nothing is said."""
    blend, base, adapter = (
        Difference(0.9, 0.1, 4.0, 4.0 * (1 + changes.get(name, 0.0)), changes.get(name, 0.0))
        for name in ("blend", "base", "adapter")
    )
    return QualityReport(10, tokens, blend, base, adapter)


def test_warnings_say_whose_perplexity_is_past_the_threshold() -> None:
    assert quality_warnings(report_of(blend=0.019, base=-0.5, adapter=9.0), 0.02) == []
    (blend,) = quality_warnings(report_of(blend=0.031), 0.02)
    assert blend.startswith("the perplexity of the blend rises by 3.1%, from 4 to 4.124, which is past")
    assert "2.0%" in blend
    (base,) = quality_warnings(report_of(base=0.025), 0.02)
    assert base.startswith("the perplexity of the base rises by 2.5%")
    assert len(quality_warnings(report_of(blend=math.nan, base=math.nan), 0.02)) == 2
    (few,) = quality_warnings(report_of(tokens=10), 0.02)
    assert "10 tokens" in few


def test_a_measurement_reports_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, lines = random_logits(0), list[str]()
    clock = iter([100.0, 100.0, 105.0, 111.0, 112.0, 125.0])
    monkeypatch.setattr("export.verification.quality.time.monotonic", lambda: next(clock))
    measure_quality(side(base=logits), side(base=logits), random_texts(20, 20, 30, 9, 9), lines.append)
    assert lines == [
        "quality   measuring on 5 texts of 88 tokens, 48 of which are judged",
        "quality   2 of 5 texts after 11 s",
        "quality   4 of 5 texts after 25 s",
    ]
