"""The texts that everything is judged on: the same token ids for every program."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from imsm_core.data.dataset import Example
from imsm_core.data.readers import BadRow, read_file, rows
from imsm_core.errors import DataError

QUERY = 4
"""Tokens at a text's beginning that are the gate's query; what comes after them is judged."""
SHORTEST = 16
Texts = dict[str, list[list[int]]]
"""kind -> texts -> token ids."""


def read_texts(
    files: Mapping[str, Path], tokenizer: PreTrainedTokenizerBase, tokens: int, longest: int, seed: int = 0
) -> Texts:
    """About `tokens` tokens of every file, in texts of at most `longest` tokens from rows in random order.

    A row's text is its fields that hold text, in the row's order, with a newline between them; no template is used.
    Raises DataError for rows that are not JSON objects, and for a file with fewer tokens.
    """
    found = {}
    for kind, path in files.items():
        texts = [_text(path, number, row) for number, row in rows(read_file(path), path)]
        random.Random(seed).shuffle(texts)
        found[kind] = _cut(path, texts, tokenizer, tokens, longest)
    return found


def examples(texts: list[list[int]]) -> list[Example]:
    """Token ids as query and judged rest."""
    return [Example(ids[:QUERY], ids[QUERY:]) for ids in texts]


def save(texts: Texts, path: Path) -> None:
    path.write_text(json.dumps(texts) + "\n", encoding="utf-8")


def load(path: Path) -> Texts:
    texts: Texts = json.loads(path.read_text(encoding="utf-8"))
    return texts


def _text(path: Path, number: int, row: dict[str, object] | BadRow) -> str:
    if isinstance(row, BadRow):
        raise DataError(f"{path}, line {number}: {row}")
    return "\n".join(value for value in row.values() if isinstance(value, str) and value)


def _cut(
    path: Path, texts: list[str], tokenizer: PreTrainedTokenizerBase, tokens: int, longest: int
) -> list[list[int]]:
    chosen: list[list[int]] = []
    missing = tokens
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=longest)["input_ids"]
        if len(ids) < SHORTEST:
            continue
        # The last text may be longer than what is missing: a text of few tokens judges almost nothing.
        chosen.append(ids[: max(missing, SHORTEST)])
        missing -= len(chosen[-1])
        if missing <= 0:
            return chosen
    raise DataError(f"{path} has {tokens - missing} tokens in texts of {SHORTEST} or more; {tokens} were asked for")
