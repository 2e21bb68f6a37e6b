"""The quality gate of a quantized artifact: how far its next-token distributions are from the float32 model's.

Knows nothing about graphs or PyTorch's models: either side is a function from a text to logits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from imsm_core.data.encoding import encode_answer, encode_prompt
from imsm_core.data.readers import rows, text_field
from imsm_core.errors import DataError

from ..choices import LARGEST_PERPLEXITY_CHANGE
from ..errors import ExportError, VerificationError

Array = NDArray[Any]
Logits = Callable[[list[int]], Array]
"""A text's token ids (S,) -> logits (S, vocab) float32, row t after the tokens up to t."""

LONGEST = 512  # tokens of a text: logits at every position of a large vocabulary fill the memory
QUERY_TOKENS = 8
FEW_TOKENS = 1000
_ROWS = 128  # positions whose logits are in float64 at a time
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


def query_length(text: Sequence[int]) -> int:
    """How many of a text's first tokens are the gate's query, on both sides: as when a prompt is continued, what is
    predicted comes after it, so that no prediction sees its own answer through the query."""
    return min(QUERY_TOKENS, len(text) - 1)


def read_eval_texts(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    limit: int,
    prompt_field: str = "prompt",
    answer_field: str = "answer",
) -> list[list[int]]:
    """Token ids of the first `limit` rows of a JSONL file, each cut to the context and to LONGEST.

    A row holds "text", or a prompt and an answer, which are encoded as for training; all rows like the first one.
    Raises DataError with the line number for a row in another form or with fewer than two tokens, and for a file
    without rows; ExportError for a limit or a context that leaves nothing.
    """
    if limit < 1:
        raise ExportError(f"the number of texts to evaluate is {limit}; it must be at least 1")
    longest = min(context_length, LONGEST)
    if longest < 2:
        raise ExportError(f"a context of {context_length} tokens leaves nothing to predict")
    texts: list[list[int]] = []
    plain: bool | None = None
    for number, row in itertools.islice(rows(path), limit):
        if plain is None:
            plain = "text" in row
            if not plain and not {prompt_field, answer_field} <= row.keys():
                raise DataError(
                    f"{path}, line {number} has neither 'text' nor {prompt_field!r} and {answer_field!r}; "
                    f"it has {', '.join(map(repr, row)) or 'nothing'}"
                )
        if plain:
            ids: list[int] = tokenizer(text_field(row, "text", path, number))["input_ids"]
        else:
            prompt, answer = (text_field(row, field, path, number) for field in (prompt_field, answer_field))
            ids = [*encode_prompt(tokenizer, prompt), *encode_answer(tokenizer, answer)]
        if len(ids) < 2:
            raise DataError(f"{path}, line {number} has fewer than two tokens; there is nothing to predict")
        texts.append(ids[:longest])
    if not texts:
        raise DataError(f"{path} has no rows to evaluate on")
    return texts


def measure_quality(reference: Logits, found: Logits, texts: Sequence[list[int]]) -> QualityReport:
    """Compare the two sides' predictions of every token after `query_length` of each text, in float64.

    reference: the siamese model in float32. found: the artifact. Both take the text's first `query_length` tokens as
    the query, and no later ones; one text is in memory at a time. Raises VerificationError if their logits differ in
    shape or are not finite, ExportError if there are no texts.
    """
    tokens = agreeing = 0
    kl = loss_reference = loss_found = 0.0
    for text in texts:
        sides = [side(text) for side in (reference, found)]
        for logits, name in zip(sides, ("reference", "quantized"), strict=True):
            if len(logits) != len(text) or logits.shape != sides[0].shape:
                raise VerificationError(
                    f"the {name} model's logits are {logits.shape} for {len(text)} tokens; the reference's are "
                    f"{sides[0].shape}"
                )
            if not np.isfinite(logits).all():
                raise VerificationError(f"the {name} model gives logits that are not finite")
        first = query_length(text) - 1
        targets = np.array(text[first + 1 :])
        tokens += len(targets)
        for start in range(0, len(targets), _ROWS):
            part = targets[start : start + _ROWS]
            at = slice(first + start, first + start + len(part))
            expected, actual = (_log_softmax(logits[at]) for logits in sides)
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
