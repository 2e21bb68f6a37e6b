"""Examples: rows of a data file as the token ids of prompts and their answers."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from ..errors import DataError, setting
from .encoding import Encoder
from .forms import NULL, Fields, Form, find_form
from .readers import BadRow, Row, read_file, rows

QUERY_TOKENS = 8
TOO_LONG = "too long"


@dataclass(frozen=True)
class Example:
    """One row, or one answer of a conversation, as token ids: the prompt (which is also the gate's query) and the
    answer with its end token."""

    prompt_ids: list[int]
    answer_ids: list[int]

    @property
    def token_ids(self) -> list[int]:
        """All of it."""
        return self.prompt_ids + self.answer_ids

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


@dataclass(frozen=True)
class Dataset:
    """Examples of one file. `skipped` examples were longer than `max_length` tokens; skipped_by_reason: how many rows
    or examples were left out, by reason, those among them. form: of the file's rows, as `Form` names it. rows: how many
    the file has."""

    examples: list[Example]
    path: str
    sha256: str
    skipped: int
    skipped_by_reason: dict[str, int] = field(default_factory=dict)
    form: str = "prompts"
    rows: int = 0


class ExampleReader:
    """The examples of a data file, a row at a time.

    encoder: of prompts and answers. fields: where a row's prompt and answer are. vocabulary: how many tokens the model
    has; None does not check. skip_bad_rows: count rows that cannot be used in `skipped`, by reason, instead of stopping
    at the first; rows whose text is null, as tables write what is missing, always. After the first good row `form` is
    the file's form; `rows` counts them all; `sha256` is the file's.
    """

    def __init__(
        self, path: Path, encoder: Encoder, fields: Fields, vocabulary: int | None = None, skip_bad_rows: bool = False
    ) -> None:
        """Raises DataError if the file cannot be read."""
        content = read_file(path)
        self.path = path
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.form: Form | None = None
        self.rows = 0
        self.skipped: Counter[str] = Counter()
        self._rows = rows(content, path)
        self._encoder = encoder
        self._fields = fields
        self._vocabulary = vocabulary
        self._skip = skip_bad_rows

    @property
    def plain(self) -> bool:
        """Whether the rows are plain text."""
        return self.form is not None and self.form.name == "text"

    def __iter__(self) -> Iterator[list[Example]]:
        """The examples of every good row, at least one: of plain text the first tokens are the prompt. Raises DataError
        with the line number of the first row that cannot be used, unless those are skipped."""
        for number, row in self._rows:
            self.rows += 1
            try:
                found = self._examples(row)
            except BadRow as bad:
                if not self._skip and bad.reason != NULL:
                    advice = f"{setting('skip_bad_rows')} skips and counts such rows"
                    raise DataError(f"{self.path}, line {number}: {bad}; {advice}") from bad
                self.skipped[bad.reason] += 1
            else:
                yield found

    def _examples(self, row: Row | BadRow) -> list[Example]:
        if isinstance(row, BadRow):
            raise row
        form = self.form or find_form(row, self._fields)
        if form.name == "text":
            ids: list[int] = self._encoder.tokenizer(form.text(row))["input_ids"]
            if len(ids) < 2:
                raise BadRow("too short", "it has fewer than two tokens; there is nothing to predict")
            found = [plain_example(ids)]
        else:
            found = [Example(*self._encoder.turn(turn)) for turn in form.turns(row)]
        for example in found:
            if not example.prompt_ids:
                raise BadRow("empty field", "its prompt has no tokens")
            if not example.answer_ids:
                raise BadRow("empty field", "its answer has no tokens")
            self._check_tokens(example.token_ids)
        self.form = form
        return found

    def _check_tokens(self, ids: Sequence[int]) -> None:
        largest = max(ids)
        if self._vocabulary is not None and largest >= self._vocabulary:
            token = self._encoder.tokenizer.convert_ids_to_tokens(largest)
            raise BadRow(
                "unknown token",
                f"its token {token!r} has the id {largest}, and the model has {self._vocabulary} tokens: the tokenizer "
                "is larger than the model's embeddings",
            )


def plain_example(ids: list[int]) -> Example:
    """Plain text, at least two tokens of it: its first tokens are the gate's query, as when a prompt is continued, so
    that no token sees itself through the query."""
    query = min(QUERY_TOKENS, len(ids) - 1)
    return Example(ids[:query], ids[query:])


def load_jsonl(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    prompt_field: str | None,
    answer_field: str | None,
    max_length: int,
    raw: bool = False,
    skip_bad_rows: bool = False,
    vocabulary: int | None = None,
) -> Dataset:
    """Read JSON objects, one a line or in one array, in one of the known forms, or with the fields that are given.

    With a chat template (and `raw` false) a prompt is rendered by it. Longer examples are skipped, longer plain text is
    cut into pieces. skip_bad_rows, vocabulary: as in `ExampleReader`. Raises DataError with the line number for a row
    that cannot be trained on, unless those are skipped, and when nothing is left.
    """
    given = Fields(prompt_field, answer_field)
    reader = ExampleReader(path, Encoder(tokenizer, raw), given, vocabulary, skip_bad_rows)
    examples: list[Example] = []
    for found in reader:
        if reader.plain:
            found = _pieces(found[0], tokenizer.eos_token_id, max_length)
        for example in found:
            if len(example) > max_length:
                reader.skipped[TOO_LONG] += 1
            else:
                examples.append(example)
    skipped = dict(reader.skipped)
    if not examples:
        raise DataError(f"{path} has nothing to train on: {_nothing_left(skipped, max_length)}")
    form = reader.form.name if reader.form is not None else ""
    return Dataset(examples, str(path), reader.sha256, skipped.get(TOO_LONG, 0), skipped, form, reader.rows)


def _pieces(text: Example, eos_token_id: int | None, longest: int) -> list[Example]:
    """A plain text with its end token, in pieces of at most `longest` tokens. A last one of a single token, of which
    nothing can be learned, gets the one before it as well."""
    ids = [*text.token_ids, *([] if eos_token_id is None else [eos_token_id])]
    pieces = [ids[start : start + longest] for start in range(0, len(ids), longest)]
    if len(pieces) > 1 and len(pieces[-1]) == 1:
        pieces[-1] = ids[-2:]
    return [plain_example(piece) for piece in pieces if len(piece) > 1]


def _nothing_left(skipped: dict[str, int], max_length: int) -> str:
    if not skipped:
        return "it has no rows"
    if skipped.keys() == {TOO_LONG}:
        return f"all {skipped[TOO_LONG]} rows are longer than {max_length} tokens"
    return f"all rows are skipped ({told(skipped)})"


def told(counts: dict[str, int]) -> str:
    """Counts by reason in one line, the most frequent first."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items(), key=lambda item: -item[1]))


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """A permutation of range(count) that depends only on seed and epoch, so that a resumed run sees the
    same order."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return [int(index) for index in torch.randperm(count, generator=generator)]
