"""Examples: one row of a data file as the token ids of a prompt and its answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from ..files import sha256_of_file
from .encoding import encode_answer, encode_prompt
from .readers import rows, text_field


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


def load_jsonl(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    prompt_field: str,
    answer_field: str,
    max_length: int,
    raw: bool = False,
) -> Dataset:
    """Read one JSON object per line. With a chat template (and `raw` false) the prompt is a user turn.

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


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """A permutation of range(count) that depends only on seed and epoch, so that a resumed run sees the
    same order."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return [int(index) for index in torch.randperm(count, generator=generator)]
