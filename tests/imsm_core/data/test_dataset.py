"""Data files as examples: fields, lengths, and a line number in every complaint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from imsm_core.backbone import load_tokenizer
from imsm_core.data.dataset import Dataset, Example, epoch_order, load_jsonl
from imsm_core.data.encoding import encode_answer, encode_prompt
from imsm_core.errors import DataError
from tests.builders import EOS, make_tokenizer, write_jsonl


def load(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, content: str, max_length: int = 100) -> Dataset:
    file = tmp_path / "rows.jsonl"
    file.write_text(content, encoding="utf-8")
    return load_jsonl(file, tokenizer, "prompt", "answer", max_length)


def test_fields_are_chosen_by_name_and_others_ignored(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = write_jsonl(tmp_path / "q.jsonl", [{"question": "a", "reply": "b", "id": 7}])
    dataset = load_jsonl(file, tokenizer, "question", "reply", 100)
    assert dataset.examples == [Example(encode_prompt(tokenizer, "a"), encode_answer(tokenizer, "b"))]
    assert dataset.path == str(file)
    assert len(dataset.sha256) == 64


def test_raw_reaches_every_row(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    file = write_jsonl(tmp_path / "q.jsonl", [{"prompt": "a", "answer": "b"}])
    templated, raw = (load_jsonl(file, chat_tokenizer, "prompt", "answer", 100, raw) for raw in (False, True))
    assert chat_tokenizer.decode(templated.examples[0].prompt_ids) == "[user]a\n[assistant]"
    assert chat_tokenizer.decode(raw.examples[0].prompt_ids) == "<s>a"


def test_rows_longer_than_the_limit_are_skipped_and_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = "".join(f'{{"prompt": "{"p" * n}", "answer": "a"}}\n' for n in (1, 5, 6, 50))
    dataset = load(tmp_path, tokenizer, rows, max_length=8)  # <s>ppppp + a</s>
    assert [len(example) for example in dataset.examples] == [4, 8]
    assert dataset.skipped == 2


GOOD = '{"prompt": "p", "answer": "a"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD + "{broken\n", "line 2 is not JSON"),
        (GOOD + '{"prompt": "p"}\n', "line 2 has no field 'answer'"),
        (GOOD + '{"prompt": "", "answer": "a"}\n', "line 2: the prompt field 'prompt' is empty"),
        ("", "nothing to train on: it has no rows"),
        ('{"prompt": "' + "p" * 200 + '", "answer": "a"}\n', "all 1 rows are longer than 100 tokens"),
    ],
)
def test_bad_row_is_named_by_its_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, content: str, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path, tokenizer, content)
    assert "rows.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_answer_without_a_single_token_is_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path)
    empty = '{"prompt": "p", "answer": ""}\n'
    assert load(tmp_path, tokenizer, empty).examples[0].answer_ids == [EOS]
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="line 2: the answer field 'answer' is empty"):
        load(tmp_path, tokenizer, GOOD + empty)


def test_epoch_order_depends_on_seed_and_epoch_alone() -> None:
    torch.manual_seed(1)
    first = epoch_order(50, 7, 3)
    torch.manual_seed(2)
    assert epoch_order(50, 7, 3) == first
    assert sorted(first) == list(range(50))
    assert first != epoch_order(50, 7, 4)
    assert first != epoch_order(50, 8, 3)


@pytest.mark.parametrize(
    ("name", "fields", "rows"),
    [("gsm8k/test.jsonl", ("question", "answer"), 1319), ("cola/test.jsonl", ("input", "output"), 1043)],
)
def test_real_data_sets_load_whole(
    shared_data: Path, stories_folder: Path, name: str, fields: tuple[str, str], rows: int
) -> None:
    dataset = load_jsonl(shared_data / name, load_tokenizer(str(stories_folder)), *fields, max_length=100_000)
    assert len(dataset.examples) == rows
    assert dataset.skipped == 0
    assert all(example.answer_ids[-1] == 2 for example in dataset.examples)
