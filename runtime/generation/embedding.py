"""Texts as vectors: the last hidden states of a memory, pooled over each text's tokens.

Texts of similar length are read together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checks import instance, is_sequence
from ..engine.pooling import check_states, pooled_states
from ..engine.session import Session
from ..errors import PromptError, shown
from .embed_settings import EmbedSettings
from .generation import Model

AT_ONCE = 256
"""Texts that are sorted by length among each other: results come in the input's order, so many at a time."""
MOST_PADDING = 0.25
"""Of the tokens that are read together."""


@dataclass(frozen=True)
class EmbedResult:
    """embeddings: (n, d) float32, in the order of the texts. tokens: (n,) int64, how many each text has."""

    embeddings: NDArray[np.float32]
    tokens: NDArray[np.int64]


def embed(model: Model, texts: Sequence[str], settings: EmbedSettings | None = None, **changes: Any) -> EmbedResult:
    """The embeddings of `texts`, which are read as they are, without the chat template. settings: `changes` override
    its fields or the defaults, such as `memory="base"`.

    Raises, before anything is computed, PromptError for a text that is none, is empty or does not fit into the context,
    with its number from 1, and SettingsError for a memory whose states the artifact does not give; then ArtifactError
    for states that are not finite, and ProviderError.
    """
    instance("model", model, Model)
    if settings is not None:
        instance("settings", settings, EmbedSettings)
    settings = replace(settings or EmbedSettings(), **changes)
    if not is_sequence(texts):
        raise PromptError(f"texts are {shown(texts)}, not a sequence of texts")
    prepared = []
    for number, text in enumerate(texts, 1):
        try:
            prepared.append(prepare(model, text, settings))
        except PromptError as error:
            raise PromptError(f"text {number}: {error}") from error
    found = np.zeros((len(texts), model.session.manifest.hidden_size), np.float32)
    for index, embedding in enumerate(embed_prepared(model.session, prepared, settings)):
        found[index] = embedding
    return EmbedResult(found, np.array([len(ids) for ids in prepared], np.int64))


def prepare(model: Model, text: Any, settings: EmbedSettings) -> list[int]:
    """A text as tokens. Raises PromptError if it is none or cannot be encoded, and as `prepare_ids`."""
    check_states(model.session, settings.memory)
    if not isinstance(text, str):
        raise PromptError(f"it is {shown(text)}, not a text")
    return prepare_ids(model, model.codec.encode_raw(text) if text else [], settings)


def prepare_ids(model: Model, tokens: Any, settings: EmbedSettings) -> list[int]:
    """Tokens of a text. Raises PromptError for what are none, for an empty text, and if it does not fit into the
    context, and SettingsError for a memory whose states the artifact does not give."""
    check_states(model.session, settings.memory)
    ids = model.session.token_ids(tokens)
    if not ids:
        raise PromptError("it is empty")
    most = model.session.manifest.context_length
    if len(ids) > most:
        raise PromptError(f"it has {len(ids)} tokens; the model's context is {most}")
    return ids


def embed_prepared(
    session: Session, texts: Sequence[Sequence[int]], settings: EmbedSettings
) -> Iterator[NDArray[np.float32]]:
    """The embedding (d,) of each text that `prepare` made, in their order."""
    tokens = max(1, session.prefill_rows // len(session.manifest.streams))
    for start in range(0, len(texts), AT_ONCE):
        window = texts[start : start + AT_ONCE]
        found = np.zeros((len(window), session.manifest.hidden_size), np.float32)
        for rows in _batches(window, settings.batch_size, tokens, session.manifest.padding):
            same = [window[row] for row in rows]
            chunk = max(1, tokens // len(rows))
            found[rows] = pooled_states(session, same, settings.memory, settings.pooling, chunk)
        if settings.normalize:
            lengths = np.sqrt((found.astype(np.float64) ** 2).sum(-1, keepdims=True))
            found = (found / np.maximum(lengths, np.finfo(np.float32).tiny)).astype(np.float32)
        yield from found


def _batches(texts: Sequence[Sequence[int]], most: int, tokens: int, padding: int) -> Iterator[list[int]]:
    """The places of texts that are read together: no more than `most` of them, no more than `tokens` with their
    padding, of which there is little, and none where one is longer than `padding`, to which rows can be padded."""
    batch: list[int] = []
    total = 0
    for row in sorted(range(len(texts)), key=lambda row: len(texts[row])):
        length = len(texts[row])
        padded = length * (len(batch) + 1)
        fits = padded <= tokens and length <= padding and padded - (total + length) <= MOST_PADDING * padded
        if batch and (len(batch) == most or not fits):
            yield batch
            batch, total = [], 0
        batch.append(row)
        total += length
    if batch:
        yield batch
