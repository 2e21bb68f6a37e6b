"""JSONL rows -> token ids of a prompt and its answer -> padded batches."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import BaseModelError, DataError
from ..files import sha256_of_file

IGNORED_LABEL = -100


@dataclass(frozen=True)
class Example:
    """One row as token ids: the prompt (which is also the gate's query) and the answer with its end token."""

    prompt_ids: list[int]
    answer_ids: list[int]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


@dataclass(frozen=True)
class Dataset:
    """Examples of one file. `skipped` rows were longer than `max_length` tokens."""

    examples: list[Example]
    path: str
    sha256: str
    skipped: int


class Batch(NamedTuple):
    """input_ids, attention_mask, query_mask: (B, S), right-padded. labels: (B, S), -100 where nothing is learned;
    labels[b, t] is the token at t itself (the loss shifts)."""

    input_ids: Tensor
    attention_mask: Tensor
    query_mask: Tensor
    labels: Tensor


def load_jsonl(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    prompt_field: str,
    answer_field: str,
    max_length: int,
    raw: bool = False,
) -> Dataset:
    """Read one JSON object per line. With a chat template (and `raw` false) the prompt is a user's turn.

    Raises DataError with the line number for a row that is not an object, lacks a field, or has an empty prompt or an
    answer without a token, and when no row is short enough.
    """
    examples: list[Example] = []
    skipped = 0
    for number, row in rows(path):
        prompt = text_field(row, prompt_field, path, number)
        answer = text_field(row, answer_field, path, number)
        example = Example(encode_prompt(tokenizer, prompt, raw), encode_answer(tokenizer, answer))
        if not prompt or not example.prompt_ids:
            raise DataError(f"{path}, line {number}: the prompt field {prompt_field!r} is empty")
        if not example.answer_ids:
            raise DataError(f"{path}, line {number}: the answer field {answer_field!r} is empty")
        if len(example) > max_length:
            skipped += 1
        else:
            examples.append(example)
    if not examples:
        reason = f"all {skipped} rows are longer than {max_length} tokens" if skipped else "it has no rows"
        raise DataError(f"{path} has nothing to train on: {reason}")
    return Dataset(examples, str(path), sha256_of_file(path), skipped)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, raw: bool = False) -> list[int]:
    """Token ids of a prompt: through the tokenizer's chat template as one user turn if it has one, else as it is
    with the special tokens that the tokenizer adds. The runtime encodes in the same way. Raises BaseModelError if the
    template cannot render one user turn."""
    if raw or not tokenizer.chat_template:
        ids: list[int] = tokenizer(prompt)["input_ids"]
        return ids
    turns = [{"role": "user", "content": prompt}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError) as error:
        raise BaseModelError(f"the tokenizer's chat template fails on a single user's turn: {error}") from error
    chat_ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return chat_ids


def encode_answer(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """Token ids of an answer and the end-of-sequence token, so that the model learns to stop."""
    ids: list[int] = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]


def collate(examples: Sequence[Example], pad_token_id: int) -> Batch:
    """Right-pad to the longest example."""
    length = max(len(example) for example in examples)
    input_ids = torch.full((len(examples), length), pad_token_id, dtype=torch.int64)
    attention_mask, query_mask = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED_LABEL)
    for row, example in enumerate(examples):
        prompt_end, end = len(example.prompt_ids), len(example)
        input_ids[row, :end] = torch.tensor(example.prompt_ids + example.answer_ids)
        attention_mask[row, :end] = 1
        query_mask[row, :prompt_end] = 1
        labels[row, prompt_end:end] = input_ids[row, prompt_end:end]
    return Batch(input_ids, attention_mask, query_mask, labels)


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """A permutation of range(count) that depends on nothing but seed and epoch, so that a resumed run sees the
    same order."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return [int(index) for index in torch.randperm(count, generator=generator)]


def rows(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """Every JSON object of a JSONL file with its line number. Raises DataError for what cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: JSON text may hold U+2028
    except OSError as error:
        raise DataError(f"cannot read the data file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number} is not JSON: {error.msg} at column {error.colno}") from error
        except (ValueError, RecursionError) as error:  # a number of 5,000 digits, a thousand brackets
            raise DataError(f"{path}, line {number} cannot be read: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number} is not a JSON object but {type(row).__name__}")
        yield number, row


def text_field(row: dict[str, object], field: str, path: Path, number: int) -> str:
    """The text in one field of line `number`. Raises DataError if it is not there, or not text."""
    if field not in row:
        raise DataError(f"{path}, line {number} has no field {field!r}; it has {', '.join(map(repr, row)) or 'none'}")
    value = row[field]
    if not isinstance(value, str):
        raise DataError(f"{path}, line {number}: field {field!r} is not text but {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{path}, line {number}: field {field!r} is not Unicode text: {error.reason}") from error
    return value
