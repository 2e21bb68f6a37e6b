"""The quality gate of a quantized artifact: how far its next-token distributions are from the float32 model's, of the
blend and of each memory alone.

Knows nothing about graphs or PyTorch's models: either side is a function from a text to logits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imsm_core.data.dataset import Example

from ..choices import LARGEST_PERPLEXITY_CHANGE
from ..errors import ExportError, VerificationError

Array = NDArray[Any]
Side = Callable[[Example], Iterator[Mapping[str, Array]]]
"""A text whose prompt is the query -> what predicts its answer tokens, by who speaks (blend, base, adapter): logits (n,
vocab) float32 at POSITIONS places at a time, fewer at the end."""

FEW_TOKENS = 1000
WARNED = ("blend", "base")
"""Whose perplexity is held against the threshold: what people read, and the memory that must not be lost."""
POSITIONS = 64
"""Whose logits are in memory at a time."""
_SECONDS = 10.0  # between two reports of progress
_LARGEST_LOSS = 700.0  # e to a higher power overflows


@dataclass(frozen=True)
class Difference:
    """argmax_agreement: share of predictions with the same most likely token, in [0, 1]. mean_kl: KL(reference ||
    found), nats a token. perplexity_change: relative, 0.01 is one percent worse."""

    argmax_agreement: float
    mean_kl: float
    perplexity_reference: float
    perplexity: float
    perplexity_change: float


@dataclass(frozen=True)
class QualityReport:
    """tokens: predictions that were compared of each. blend, adapter: None where there is the base stream alone."""

    texts: int
    tokens: int
    blend: Difference | None
    base: Difference | None
    adapter: Difference | None

    @property
    def measured(self) -> dict[str, Difference]:
        """By what speaks: the blend, the base memory alone, the adapter's."""
        found = {name: getattr(self, name) for name in ("blend", "base", "adapter")}
        return {name: difference for name, difference in found.items() if difference is not None}

    def as_dict(self, file: Path | None) -> dict[str, Any]:
        """For the manifest. file: where the texts are from; its name alone is written."""
        return {"file": None if file is None else file.name, **asdict(self)}


class _Sums:
    """What is added up over the predictions of one of the three."""

    def __init__(self) -> None:
        self.tokens = self.agreeing = 0
        self.kl = self.loss_reference = self.loss_found = 0.0

    def add(self, logits: Sequence[Array], targets: Array) -> None:
        """logits: of the reference and of the artifact, (n, vocab) each, which predict `targets` (n,)."""
        expected, actual = map(_log_softmax, logits)
        self.tokens += len(targets)
        self.agreeing += int((expected.argmax(-1) == actual.argmax(-1)).sum())
        self.kl += float((np.exp(expected) * (expected - actual)).sum())
        chosen = np.arange(len(targets)), targets
        self.loss_reference -= float(expected[chosen].sum())
        self.loss_found -= float(actual[chosen].sum())

    def difference(self) -> Difference:
        tokens = self.tokens
        return Difference(
            argmax_agreement=self.agreeing / tokens,
            mean_kl=max(self.kl / tokens, 0.0),
            perplexity_reference=math.exp(min(self.loss_reference / tokens, _LARGEST_LOSS)),
            perplexity=math.exp(min(self.loss_found / tokens, _LARGEST_LOSS)),
            perplexity_change=math.expm1(min((self.loss_found - self.loss_reference) / tokens, _LARGEST_LOSS)),
        )


def measure_quality(
    reference: Side, found: Side, texts: Sequence[Example], report: Callable[[str], None] = lambda line: None
) -> QualityReport:
    """Compare the two sides' predictions of every answer token, in float64, of each of the three that both know.

    reference: the siamese model in float32. found: the artifact. report: gets a line at the start, and one every few
    seconds in a long run. Raises VerificationError if their logits differ in shape or are not finite, ExportError if
    there are no texts.
    """
    sums: dict[str, _Sums] = {}
    for text in _with_progress(texts, report):
        targets = np.array(text.answer_ids)
        starts = range(0, len(targets), POSITIONS)
        for start, expected, actual in zip(starts, reference(text), found(text), strict=True):
            part = targets[start : start + POSITIONS]
            for name in actual:
                logits = expected[name], actual[name]
                _check(logits, len(part))
                sums.setdefault(name, _Sums()).add(logits, part)
    if not sums:
        raise ExportError("there are no texts of two tokens or more to evaluate on")
    differences = {name: total.difference() for name, total in sums.items()}
    tokens = next(iter(sums.values())).tokens
    return QualityReport(
        len(texts), tokens, differences.get("blend"), differences.get("base"), differences.get("adapter")
    )


def in_pieces(logits: Mapping[str, Array], positions: int) -> Iterator[Mapping[str, Array]]:
    """What a `Side` gives, of the logits (positions, vocab) of a whole text."""
    for start in range(0, positions, POSITIONS):
        yield {name: rows[start : start + POSITIONS] for name, rows in logits.items()}


def _check(sides: Sequence[Array], tokens: int) -> None:
    for logits, name in zip(sides, ("reference", "quantized"), strict=True):
        if len(logits) != tokens or logits.shape != sides[0].shape:
            raise VerificationError(
                f"the {name} model's logits are {logits.shape} for {tokens} tokens; the reference's are "
                f"{sides[0].shape}"
            )
        if not np.isfinite(logits).all():
            raise VerificationError(f"the {name} model gives logits that are not finite")


def _with_progress(texts: Sequence[Example], report: Callable[[str], None]) -> Iterator[Example]:
    """Every text, with lines about how far the measurement is."""
    start = told = time.monotonic()
    tokens, judged = sum(map(len, texts)), sum(len(text.answer_ids) for text in texts)
    report(f"quality   measuring on {len(texts)} texts of {tokens} tokens, {judged} of which are judged")
    for done, text in enumerate(texts):
        now = time.monotonic()
        if now - told >= _SECONDS:
            report(f"quality   {done} of {len(texts)} texts after {now - start:.0f} s")
            told = now
        yield text


def quality_warnings(report: QualityReport, threshold: float = LARGEST_PERPLEXITY_CHANGE) -> list[str]:
    """One line for each reason not to rely on the artifact: a perplexity of the blend or of the base memory that rose
    by more than `threshold`, and a sample that is too small to tell."""
    warnings = []
    for name, found in report.measured.items():
        if name in WARNED and not found.perplexity_change <= threshold:
            warnings.append(
                f"the perplexity of the {name} rises by {found.perplexity_change:.1%}, from "
                f"{found.perplexity_reference:.4g} to {found.perplexity:.4g}, which is past the threshold of "
                f"{threshold:.1%}: the quantized model does not keep the quality of the float32 one"
            )
    if report.tokens < FEW_TOKENS:
        warnings.append(
            f"the quality was measured on {report.tokens} tokens only; give {FEW_TOKENS} or more of held-out text"
        )
    return warnings


def _log_softmax(logits: Array) -> Array:
    """(S, vocab) -> the same, float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted
