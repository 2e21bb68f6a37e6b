"""Rows of a JSONL file to token ids and batches, and a line number in every complaint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from imsm_core.backbone import load_tokenizer
from imsm_core.data.dataset import (
    IGNORED_LABEL,
    Dataset,
    Example,
    collate,
    encode_answer,
    encode_prompt,
    epoch_order,
    load_jsonl,
)
from imsm_core.errors import BaseModelError, DataError
from tests.builders import BOS, CHAT_TEMPLATE, EOS, PAD, make_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return make_tokenizer(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return make_tokenizer(tmp_path_factory.mktemp("chat"), CHAT_TEMPLATE)


def text_of(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids))


def load(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, content: str | bytes, max_length: int = 100) -> Dataset:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return load_jsonl(file, tokenizer, "prompt", "answer", max_length)


def test_prompt_gets_the_tokenizers_special_tokens_and_the_answer_its_end(tokenizer: PreTrainedTokenizerBase) -> None:
    assert text_of(tokenizer, encode_prompt(tokenizer, "hi ")) == "<s>hi "
    assert text_of(tokenizer, encode_answer(tokenizer, "you")) == "you</s>"


def test_chat_template_makes_the_prompt_a_users_turn(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    assert text_of(chat_tokenizer, encode_prompt(chat_tokenizer, "hi")) == "[user]hi\n[assistant]"
    assert text_of(chat_tokenizer, encode_prompt(chat_tokenizer, "hi", raw=True)) == "<s>hi"
    assert text_of(chat_tokenizer, encode_answer(chat_tokenizer, "you")) == "you</s>"


@pytest.mark.parametrize("template", ["{{ raise_exception('a system turn is needed') }}", "{% if"])
def test_chat_template_that_fails_is_the_models_fault(tmp_path: Path, template: str) -> None:
    with pytest.raises(BaseModelError, match="chat template fails on a single user's turn"):
        encode_prompt(make_tokenizer(tmp_path, template), "hi")


def test_fields_are_chosen_by_name_and_others_ignored(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = write_jsonl(tmp_path / "q.jsonl", [{"question": "a", "reply": "b", "id": 7}])
    dataset = load_jsonl(file, tokenizer, "question", "reply", 100)
    assert dataset.examples == [Example(encode_prompt(tokenizer, "a"), encode_answer(tokenizer, "b"))]
    assert dataset.path == str(file)
    assert len(dataset.sha256) == 64


def test_raw_reaches_every_row(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    file = write_jsonl(tmp_path / "q.jsonl", [{"prompt": "a", "answer": "b"}])
    templated, raw = (load_jsonl(file, chat_tokenizer, "prompt", "answer", 100, raw) for raw in (False, True))
    assert text_of(chat_tokenizer, templated.examples[0].prompt_ids) == "[user]a\n[assistant]"
    assert text_of(chat_tokenizer, raw.examples[0].prompt_ids) == "<s>a"


def test_blank_lines_windows_line_ends_and_a_byte_order_mark_are_no_rows(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    row = '{"prompt": "a", "answer": "b"}'
    assert len(load(tmp_path, tokenizer, f"\ufeff{row}\r\n\r\n{row}").examples) == 2


def test_line_separators_inside_json_text_do_not_end_a_row(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    text = "a\u2028b\u2029c\u0085d"
    dataset = load(tmp_path, tokenizer, f'{{"prompt": "{text}", "answer": "x"}}\n')
    assert text_of(tokenizer, dataset.examples[0].prompt_ids) == f"<s>{text}"


def test_rows_longer_than_the_limit_are_skipped_and_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = "".join(f'{{"prompt": "{"p" * n}", "answer": "a"}}\n' for n in (1, 5, 6, 50))
    dataset = load(tmp_path, tokenizer, rows, max_length=8)  # <s>ppppp + a</s>
    assert [len(example) for example in dataset.examples] == [4, 8]
    assert dataset.skipped == 2


GOOD = '{"prompt": "p", "answer": "a"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD + "\n" + "{broken\n", "line 3 is not JSON: .* at column 2"),
        (GOOD + "[1, 2]\n", "line 2 is not a JSON object but list"),
        (GOOD + '"text"\n', "line 2 is not a JSON object but str"),
        (GOOD + '{"prompt": "p", "reply": "a"}\n', "line 2 has no field 'answer'; it has 'prompt', 'reply'"),
        ("{}\n", "line 1 has no field 'prompt'; it has none"),
        (GOOD + '{"prompt": 3, "answer": "a"}\n', "line 2: field 'prompt' is not text but int"),
        (GOOD + '{"prompt": "p", "answer": null}\n', "line 2: field 'answer' is not text but NoneType"),
        (GOOD + '{"prompt": "", "answer": "a"}\n', "line 2: the prompt field 'prompt' is empty"),
        (GOOD + '{"prompt": "\\ud83d", "answer": "a"}\n', "line 2: field 'prompt' is not Unicode text"),
        (GOOD + '{"prompt": "p", "answer": "a", "n": ' + "9" * 5000 + "}\n", "line 2 cannot be read"),
        (GOOD + "[" * 100_000 + "\n", "line 2 cannot be read"),
        (b'{"prompt": "caf\xe9", "answer": "a"}\n', "is not UTF-8 text: .* at byte 15"),
        ("", "nothing to train on: it has no rows"),
        ('{"prompt": "' + "p" * 200 + '", "answer": "a"}\n', "all 1 rows are longer than 100 tokens"),
    ],
)
def test_bad_row_is_named_by_its_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, content: str | bytes, message: str
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


def test_missing_file_and_folder_are_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match=r"cannot read the data file .*none\.jsonl: No such file"):
        load_jsonl(tmp_path / "none.jsonl", tokenizer, "prompt", "answer", 100)
    with pytest.raises(DataError, match="Is a directory"):
        load_jsonl(tmp_path, tokenizer, "prompt", "answer", 100)


def test_batch_is_right_padded_and_only_answers_are_learned() -> None:
    batch = collate([Example([BOS, 10, 11], [12, EOS]), Example([BOS], [20, 21, EOS, 9, 9])], PAD)
    x = IGNORED_LABEL
    assert batch.input_ids.tolist() == [[BOS, 10, 11, 12, EOS, PAD], [BOS, 20, 21, EOS, 9, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1, 0], [1] * 6]
    assert batch.query_mask.tolist() == [[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert batch.labels.tolist() == [[x, x, x, 12, EOS, x], [x, 20, 21, EOS, 9, 9]]
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64


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
