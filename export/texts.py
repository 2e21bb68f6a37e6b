"""The texts that an export calibrates and measures on, as token ids."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from imsm_core.checkpoint import INFO, CheckpointInfo
from imsm_core.data.dataset import TOO_LONG, Example, ExampleReader, told
from imsm_core.data.encoding import Encoder, encode_prompt
from imsm_core.data.forms import Fields
from imsm_core.errors import BaseModelError, CheckpointError, DataError

from .errors import ExportError
from .report import Report
from .settings import ExportSettings

LONGEST = 512  # tokens of a text: the logits of a long answer in a large vocabulary fill the memory
Kept = TypeVar("Kept")
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
    """Token ids: to calibrate weights on, to find the scales of int8 caches on, to measure the quality on (prompts, and
    the answers that count), and to find the largest activations on, which only float16 needs."""

    calibration: list[list[int]]
    scales: list[list[int]]
    evaluation: list[Example]
    activations: list[list[int]]


@dataclass(frozen=True)
class TextReader:
    """How the texts of an export are read. longest: tokens of a text. vocabulary: how many tokens the model has,
    perhaps fewer than the tokenizer. report: gets a line about rows that are skipped."""

    encoder: Encoder
    fields: Fields
    longest: int
    vocabulary: int
    skip_bad_rows: bool
    report: Report

    def whole(self, path: Path, limit: int) -> list[list[int]]:
        """Token ids of the first `limit` texts of a file, each cut to `longest`. Raises as `judged`."""
        return self._read(path, limit, lambda text: text.token_ids[: self.longest])

    def judged(self, path: Path, limit: int) -> list[Example]:
        """The first `limit` texts of a file as prompts and answers, together at most `longest` tokens: answers are cut,
        and prompts that leave no room for one are left out and counted. Of plain text the first tokens are the prompt.

        Raises DataError with the line number for a row that cannot be used, and where no text is left; ExportError for
        a context that leaves nothing to predict.
        """

        def cut(text: Example) -> Example | None:
            room = self.longest - len(text.prompt_ids)
            return Example(text.prompt_ids, text.answer_ids[:room]) if room > 0 else None

        if self.longest < 2:
            raise ExportError(f"a context of {self.longest} tokens leaves nothing to predict")
        return self._read(path, limit, cut)

    def _read(self, path: Path, limit: int, keep: Callable[[Example], Kept | None]) -> list[Kept]:
        """keep: what is kept of a text, None if that is nothing."""
        reader = ExampleReader(path, self.encoder, self.fields, self.vocabulary, self.skip_bad_rows)
        texts: list[Kept] = []
        for text in itertools.chain.from_iterable(reader):
            kept = keep(text)
            if kept is None:
                reader.skipped[TOO_LONG] += 1
            else:
                texts.append(kept)
            if len(texts) == limit:
                break
        if reader.skipped:
            self.report(f"data      {path}: rows that are skipped: {told(reader.skipped)}")
        if not texts:
            raise DataError(f"{path} has no texts: {'all rows are skipped' if reader.skipped else 'it has no rows'}")
        return texts


def trained_raw(settings: ExportSettings, info: CheckpointInfo) -> bool:
    """Whether prompts are plain text: as the settings say, or else as the adapter was trained."""
    return bool(info.training.get("raw", False)) if settings.raw is None else settings.raw


def text_fields(settings: ExportSettings, info: CheckpointInfo) -> Fields:
    """Where rows have prompts and answers: as the settings say, or else as the adapter was trained, for rows that have
    those fields. Raises CheckpointError."""
    trained: dict[str, str | None] = {}
    for name in ("prompt_field", "answer_field"):
        value = info.training.get(name)
        if not isinstance(value, str | None):
            raise CheckpointError(f"{INFO} is damaged: {name} of its training is {value!r}")
        trained[name] = value
    given = settings.prompt_field is not None or settings.answer_field is not None
    prompt, answer = (trained[name] if getattr(settings, name) is None else getattr(settings, name) for name in trained)
    return Fields(prompt, answer, required=given)


def read_texts(
    settings: ExportSettings,
    tokenizer: PreTrainedTokenizerBase,
    info: CheckpointInfo,
    context_length: int,
    vocabulary: int,
    report: Report,
) -> Texts:
    """The texts that the settings ask for, each cut to the context. vocabulary: how many tokens the model has, perhaps
    fewer than the tokenizer. Raises DataError, CheckpointError or ExportError."""
    encoder, longest = Encoder(tokenizer, trained_raw(settings, info)), min(context_length, LONGEST)
    fields = text_fields(settings, info)
    reader = TextReader(encoder, fields, longest, vocabulary, settings.skip_bad_rows, report)
    given = [] if settings.calibrate is None else reader.whole(settings.calibrate, CALIBRATION_TEXTS)
    # The scales of int8 caches fit random tokens too: what exceeds a scale is clipped, and a prompt may be anything.
    generator = np.random.default_rng(0)
    length, known = min(context_length, RANDOM_TOKENS), min(len(tokenizer), vocabulary)
    wild = [generator.integers(0, known, length).tolist() for _ in range(RANDOM_TEXTS)]
    calibration = given if settings.bits is not None else []
    evaluation = [] if settings.eval_data is None else reader.judged(settings.eval_data, settings.eval_texts)
    activations: list[list[int]] = []
    if settings.dtype_name == "float16":
        own = _up_to(GIVEN_TOKENS, given + [text.token_ids for text in evaluation])
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
