"""The quality gate of a quantized artifact: how far its next-token distributions are from the float32 model's.

Knows nothing about graphs or PyTorch's models: either side is a function from a text to logits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imsm_core.data.dataset import Example

from ..choices import LARGEST_PERPLEXITY_CHANGE
from ..errors import ExportError, VerificationError

Array = NDArray[Any]
Logits = Callable[[Example], Array]
# A text whose prompt is the gate's query -> logits (N, vocab) float32, which predict its N answer tokens.

FEW_TOKENS = 1000
_ROWS = 128  # positions whose logits are in float64 at a time
_SECONDS = 10.0  # between two reports of progress
_LARGEST_LOSS = 700.0  # e to a higher power overflows


@dataclass(frozen=True)
class QualityReport:
    """tokens: predictions that were compared. argmax_agreement: share of them with the same most likely token, in
    [0, 1]. mean_kl: KL(reference || found), nats a token. perplexity_change: relative, 0.01 is one percent worse."""

    texts: int
    tokens: int
    argmax_agreement: float
    mean_kl: float
    perplexity_reference: float
    perplexity: float
    perplexity_change: float

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self)


def measure_quality(
    reference: Logits, found: Logits, texts: Sequence[Example], report: Callable[[str], None] = lambda line: None
) -> QualityReport:
    """Compare the two sides' predictions of every answer token, in float64.

    reference: the siamese model in float32. found: the artifact. One text is in memory at a time. report: gets a line
    at the start, and one every few seconds in a long run. Raises VerificationError if their logits differ in shape or
    are not finite, ExportError if there are no texts.
    """
    tokens = agreeing = 0
    kl = loss_reference = loss_found = 0.0
    for text in _with_progress(texts, report):
        sides = [side(text) for side in (reference, found)]
        for logits, name in zip(sides, ("reference", "quantized"), strict=True):
            if len(logits) != len(text.answer_ids) or logits.shape != sides[0].shape:
                raise VerificationError(
                    f"the {name} model's logits are {logits.shape} for {len(text.answer_ids)} tokens; the reference's "
                    f"are {sides[0].shape}"
                )
            if not np.isfinite(logits).all():
                raise VerificationError(f"the {name} model gives logits that are not finite")
        targets = np.array(text.answer_ids)
        tokens += len(targets)
        for start in range(0, len(targets), _ROWS):
            part = targets[start : start + _ROWS]
            expected, actual = (_log_softmax(logits[start : start + len(part)]) for logits in sides)
            agreeing += int((expected.argmax(-1) == actual.argmax(-1)).sum())
            kl += float((np.exp(expected) * (expected - actual)).sum())
            chosen = np.arange(len(part)), part
            loss_reference -= float(expected[chosen].sum())
            loss_found -= float(actual[chosen].sum())
    if not tokens:
        raise ExportError("there are no texts of two tokens or more to evaluate on")
    return QualityReport(
        texts=len(texts),
        tokens=tokens,
        argmax_agreement=agreeing / tokens,
        mean_kl=max(kl / tokens, 0.0),
        perplexity_reference=math.exp(min(loss_reference / tokens, _LARGEST_LOSS)),
        perplexity=math.exp(min(loss_found / tokens, _LARGEST_LOSS)),
        perplexity_change=math.expm1(min((loss_found - loss_reference) / tokens, _LARGEST_LOSS)),
    )


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
    """One line for each reason not to rely on the artifact: a perplexity that rose by more than `threshold`, and a
    sample that is too small to tell."""
    warnings = []
    if not report.perplexity_change <= threshold:
        warnings.append(
            f"perplexity rises by {report.perplexity_change:.1%}, from {report.perplexity_reference:.4g} to "
            f"{report.perplexity:.4g}, which is past the threshold of {threshold:.1%}: the quantized model does not "
            "keep the quality of the float32 one"
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
