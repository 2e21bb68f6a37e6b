"""How likely given continuations of a prompt are.

A continuation is tokenized together with its prompt, and begins where the prompt's own tokens end: see
`TextCodec.encode_pair`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from ..checks import instance, is_sequence
from ..errors import PromptError, shown
from .chat_template import Message
from .generation import Model
from .prompts import are_messages
from .score_settings import ScoreSettings

_KEYS = ("prompt", "continuation")


@dataclass(frozen=True)
class Score:
    """One continuation. logprobs: of each token, in nats; it has at least one. greedy: whether each token is the
    likeliest one at its place, which greedy generation would choose. characters, bytes: of its text (UTF-8)."""

    logprobs: tuple[float, ...]
    greedy: bool
    characters: int
    bytes: int

    @property
    def logprob(self) -> float:
        """The continuation's log-likelihood in nats, the sum over its tokens."""
        return math.fsum(self.logprobs)

    @property
    def mean(self) -> float:
        """Nats a token."""
        return self.logprob / len(self.logprobs)

    @property
    def perplexity(self) -> float:
        """exp(-mean)."""
        return perplexity(self.mean)


class Prepared(NamedTuple):
    """A row as tokens."""

    prompt: list[int]
    continuations: list[list[int]]
    texts: list[str]

    @property
    def tokens(self) -> int:
        """How many are read for it."""
        return len(self.prompt) + sum(map(len, self.continuations))


def perplexity(mean: float) -> float:
    """exp(-mean), infinity where no float holds it."""
    return math.exp(-mean) if mean > -700 else math.inf


def score_texts(
    model: Model, rows: Sequence[Mapping[str, Any]], settings: ScoreSettings | None = None, **changes: Any
) -> Iterator[list[Score]]:
    """The scores of each row's continuations, row by row. A row is {"prompt": text, messages or token ids,
    "continuation": text, or a list of texts}; a prompt, and the same prompt in rows that follow each other, is read
    once. A text is a user's turn, or goes as it is with `raw`. settings: `changes` override its fields.

    Raises, before anything is computed, PromptError for a row that is none or does not fit into the context, with its
    number from 1, and SettingsError; then what `Session.prefill` raises.
    """
    instance("model", model, Model)
    if settings is not None:
        instance("settings", settings, ScoreSettings)
    settings = replace(settings or ScoreSettings(), **changes)
    if not is_sequence(rows):
        raise PromptError(f"rows are {shown(rows)}, not a sequence of rows")
    prepared = []
    for number, row in enumerate(rows, 1):
        try:
            prepared.append(prepare(model, row, settings))
        except PromptError as error:
            raise PromptError(f"row {number}: {error}") from error
    return score_prepared(model, prepared, settings)


def score_prepared(model: Model, rows: Sequence[Prepared], settings: ScoreSettings) -> Iterator[list[Score]]:
    """What `score_texts` gives for rows that `prepare` made."""
    for prompt, group in itertools.groupby(rows, lambda row: row.prompt):
        same = list(group)
        ids = [continuation for row in same for continuation in row.continuations]
        found = iter(model.session.score_each(prompt, ids, settings.memory_bias, settings.memory))
        for row in same:
            yield [
                Score(tuple(one.logprobs.tolist()), bool(one.greedy.all()), len(text), len(text.encode()))
                for text, one in zip(row.texts, found, strict=False)
            ]


def facts_of_scores(row: Mapping[str, Any], scores: Sequence[Score]) -> dict[str, Any]:
    """What JSON says of a row's scores, with the row's own id if it has one."""
    found = {"id": row["id"]} if "id" in row else {}
    if isinstance(row["continuation"], str):
        return found | _facts(scores[0])
    best = max(range(len(scores)), key=lambda index: scores[index].logprob)
    return found | {"best": best, "choices": [_facts(score) for score in scores]}


def _facts(score: Score) -> dict[str, Any]:
    """JSON has no infinity: null is what a token without any chance makes of a number."""
    numbers = {"logprob": score.logprob, "mean": score.mean, "perplexity": score.perplexity}
    return {
        **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
        "greedy": score.greedy,
        "tokens": len(score.logprobs),
        "characters": score.characters,
        "bytes": score.bytes,
    }


def check_row(row: Any) -> None:
    """Raise PromptError for what is no row of `score_texts`."""
    if not isinstance(row, Mapping):
        raise PromptError(f"it is {shown(row)}, not an object with the keys prompt and continuation")
    if missing := [key for key in _KEYS if key not in row]:
        raise PromptError(f"it has no {missing[0]}; a row has the keys prompt and continuation")
    texts = _texts(row)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise PromptError(f"the continuation is {shown(row['continuation'])}; it must be text, or a list of texts")
    if not all(texts):
        raise PromptError("the continuation is empty")
    if not isinstance(row["prompt"], str | np.ndarray) and not is_sequence(row["prompt"]):
        raise PromptError(f"the prompt is {shown(row['prompt'])}; it must be text, messages or token ids")


def prepare(model: Model, row: Mapping[str, Any], settings: ScoreSettings) -> Prepared:
    """A row as tokens. Raises PromptError if it is none, cannot be encoded or does not fit into the context, and
    SettingsError for a memory that the artifact cannot judge by."""
    model.session.check_memory(settings.memory)
    check_row(row)
    texts = _texts(row)
    pairs = [_pair(model, row["prompt"], text, settings) for text in texts]
    most = model.session.manifest.context_length
    if (longest := max(len(prompt) + len(rest) for prompt, rest in pairs)) > most:
        raise PromptError(f"prompt and continuation have {longest} tokens; the model's context is {most}")
    return Prepared(pairs[0][0], [rest for _, rest in pairs], texts)


def _texts(row: Mapping[str, Any]) -> list[Any]:
    value = row["continuation"]
    return list(value) if is_sequence(value) else [value]


def _pair(model: Model, prompt: Any, text: str, settings: ScoreSettings) -> tuple[list[int], list[int]]:
    codec = model.codec
    if isinstance(prompt, str) and codec.is_raw(settings.raw):
        return codec.encode_pair(prompt, text)
    if isinstance(prompt, str) and not prompt:
        raise PromptError("the prompt is empty")
    if not isinstance(prompt, str) and not are_messages(prompt):
        ids = model.session.token_ids(prompt)
        if not ids:
            raise PromptError("the prompt is empty")
        return ids, codec.encode_raw(text, beginning=False)
    messages: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if settings.raw:
        raise PromptError("messages go through the chat template; give text to read it as it is (raw)")
    return codec.encode_chat_pair(messages, text, settings.control_tokens)
