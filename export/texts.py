"""The texts that an export calibrates and measures on, as token ids."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from imsm_core.data.encoding import encode_prompt
from imsm_core.errors import BaseModelError

from .settings import ExportSettings
from .verification.quality import read_eval_texts

CALIBRATION_TEXTS = 64
RANDOM_TEXTS, RANDOM_TOKENS = 8, 64
GIVEN_TOKENS = 1024  # of the user's texts, to find the largest activations on
FIRST_TOKENS, SHORT = 32, 4  # random texts for them, and how long: many models answer to the first token most of all
SENTENCES = (
    "The sea was calm that morning, and the fishermen had already left the harbor when the sun came up.",
    "Über den Dächern der Altstadt kreisen Schwalben, während unten die Händler ihre Stände öffnen.",
    "Ранним утром поезд пришёл на маленькую станцию, где его уже ждали.",
    "天气很好，孩子们在河边玩耍，老人坐在树下喝茶。",
    "في الصباح الباكر خرج الصياد إلى البحر.",
    "def mean(values):\n    return sum(values) / len(values)\n\nprint(mean([1, 2, 3.5]))  # 2.1666666666666665",
)


@dataclass(frozen=True)
class Texts:
    """Token ids: to calibrate weights on, to find the scales of int8 caches on, to measure the quality on, and to find
    the largest activations on, which only float16 needs."""

    calibration: list[list[int]]
    scales: list[list[int]]
    evaluation: list[list[int]]
    activations: list[list[int]]


def read_texts(
    settings: ExportSettings, tokenizer: PreTrainedTokenizerBase, context_length: int, vocabulary: int
) -> Texts:
    """The texts that the settings ask for, each cut to the context. vocabulary: how many tokens the model has, perhaps
    fewer than the tokenizer. Raises DataError or ExportError."""

    def read(path: Path | None, limit: int) -> list[list[int]]:
        return [] if path is None else read_eval_texts(path, tokenizer, context_length, limit)

    given = read(settings.calibrate, CALIBRATION_TEXTS)
    # The scales of int8 caches fit random tokens too: what exceeds a scale is clipped, and a prompt may be anything.
    generator = np.random.default_rng(0)
    length, known = min(context_length, RANDOM_TOKENS), min(len(tokenizer), vocabulary)
    wild = [generator.integers(0, known, length).tolist() for _ in range(RANDOM_TEXTS)]
    calibration = given if settings.bits is not None else []
    evaluation = read(settings.eval_data, settings.eval_texts)
    activations: list[list[int]] = []
    if settings.dtype_name == "float16":
        own = _up_to(GIVEN_TOKENS, given + evaluation)
        fixed = ([token for token in ids if token < known] for ids in _fixed(tokenizer, generator, known))
        activations = [*own, *(ids[:context_length] for ids in fixed if ids)]
    return Texts(calibration, given + wild, evaluation, activations)


def _up_to(tokens: int, texts: Sequence[list[int]]) -> Iterator[list[int]]:
    """The first texts, the last one cut, with so many tokens together."""
    for text in texts:
        if tokens <= 0:
            return
        yield text[:tokens]
        tokens -= len(text)


def _fixed(tokenizer: PreTrainedTokenizerBase, generator: np.random.Generator, known: int) -> Iterator[list[int]]:
    """Sentences as they are, the first one also as a turn of the chat template and after the beginning-of-text token,
    and random tokens."""
    for sentence in SENTENCES:
        yield tokenizer(sentence)["input_ids"]
    with contextlib.suppress(BaseModelError):  # a template that takes other turns
        yield encode_prompt(tokenizer, SENTENCES[0])
    if tokenizer.bos_token_id is not None:
        yield [tokenizer.bos_token_id, *tokenizer(SENTENCES[0], add_special_tokens=False)["input_ids"]]
    yield from generator.integers(0, known, (FIRST_TOKENS, SHORT)).tolist()
