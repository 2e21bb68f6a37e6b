"""Data files as examples: fields, lengths, and a line number in every complaint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import normalizers
from transformers import PreTrainedTokenizerBase

from imsm_core.backbone import load_tokenizer
from imsm_core.data.dataset import TOO_LONG, Dataset, Example, epoch_order, load_jsonl, told
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
        (GOOD + "{broken\n", "line 2: it is not JSON"),
        (GOOD + '{"prompt": "p"}\n', "line 2: it has no field 'answer'"),
        (GOOD + '{"prompt": "", "answer": "a"}\n', "line 2: field 'prompt' is empty"),
        (GOOD + '{"prompt": "p", "answer": 5}\n', "line 2: field 'answer' is a number, not text; skip_bad_rows skips"),
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


def test_rows_without_a_value_are_skipped_and_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    dataset = load(tmp_path, tokenizer, GOOD + '{"prompt": "p", "answer": null}\n{"prompt": null, "answer": "a"}\n')
    assert (len(dataset.examples), dataset.rows) == (1, 3)
    assert dataset.skipped_by_reason == {"null": 2}
    with pytest.raises(DataError, match=r"nothing to train on: all rows are skipped \(1 null\)"):
        load(tmp_path, tokenizer, '{"prompt": "p", "answer": null}\n')


def test_bad_rows_are_skipped_and_counted_by_reason(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    bad = ["{broken", "[]", '{"prompt": "p"}', '{"prompt": "p", "answer": null}', '{"prompt": "p", "answer": null}']
    long = '{"prompt": "' + "p" * 200 + '", "answer": "a"}'
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join([*bad[:2], GOOD, *bad[2:], long, GOOD]))
    dataset = load_jsonl(file, chat_tokenizer, None, None, 100, skip_bad_rows=True)
    assert len(dataset.examples) == 2
    expected = {"not JSON": 1, "not a JSON object": 1, "missing field": 1, "null": 2, TOO_LONG: 1}
    assert dataset.skipped_by_reason == expected
    assert (dataset.skipped, dataset.rows, dataset.form) == (1, 8, "prompts")
    assert told(expected) == "2 null, 1 not JSON, 1 not a JSON object, 1 missing field, 1 too long"
    file.write_text("\n".join(bad))
    with pytest.raises(DataError, match=r"nothing to train on: all rows are skipped \(2 null, 1 not JSON"):
        load_jsonl(file, chat_tokenizer, None, None, 100, skip_bad_rows=True)


def test_every_answer_of_a_conversation_is_an_example(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    file = write_jsonl(tmp_path / "rows.jsonl", [{"messages": [*turns, {"role": "assistant", "content": "d"}]}])
    dataset = load_jsonl(file, chat_tokenizer, None, None, 100)
    found = [[chat_tokenizer.decode(ids) for ids in (e.prompt_ids, e.answer_ids)] for e in dataset.examples]
    assert found == [["[user]a\n[assistant]", "b</s>"], ["[user]a\n[assistant]b\n[user]c\n[assistant]", "d</s>"]]
    assert dataset.form == "messages"


def test_plain_text_is_trained_on_in_pieces_whose_first_tokens_are_the_query(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [{"text": "p" * 30}, {"text": "abc"}, {"text": "q" * 18}])
    dataset = load_jsonl(file, tokenizer, None, None, 20)
    ids = [tokenizer(text)["input_ids"] + [EOS] for text in ("p" * 30, "abc", "q" * 18)]
    whole = [ids[0][:20], ids[0][20:], ids[1], ids[2]]
    assert [example.token_ids for example in dataset.examples] == whole
    assert [len(example.prompt_ids) for example in dataset.examples] == [8, 8, 4, 8]
    assert (dataset.form, dataset.skipped_by_reason) == ("text", {})


@pytest.mark.parametrize("skip", [False, True])
def test_a_token_that_the_model_lacks_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, skip: bool) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "p", "answer": "a"}, {"prompt": "~p", "answer": "a"}])
    known = tokenizer.get_vocab()["~"]
    assert len(load_jsonl(file, tokenizer, None, None, 100, vocabulary=known + 1).examples) == 2
    if skip:
        found = load_jsonl(file, tokenizer, None, None, 100, skip_bad_rows=True, vocabulary=known)
        assert found.skipped_by_reason == {"unknown token": 1}
        return
    message = f"line 2: its token '~' has the id {known}, and the model has {known} tokens: the tokenizer is larger"
    with pytest.raises(DataError, match=message):
        load_jsonl(file, tokenizer, None, None, 100, vocabulary=known)


def test_answer_without_a_single_token_is_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("x", "")
    nothing = '{"prompt": "p", "answer": "x"}\n'
    assert load(tmp_path, tokenizer, nothing).examples[0].answer_ids == [EOS]
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="line 2: its answer has no tokens"):
        load(tmp_path, tokenizer, GOOD + nothing)


def test_an_array_of_instructions_is_read_whole(shared_data: Path, stories_folder: Path) -> None:
    file = shared_data / "instruct" / "instruction-data.json"
    dataset = load_jsonl(file, load_tokenizer(str(stories_folder)), None, None, 100_000, skip_bad_rows=True)
    assert dataset.form == "instructions"
    assert (
        len(dataset.examples) + sum(dataset.skipped_by_reason.values())
        == dataset.rows
        == len(json.loads(file.read_text()))
    )
    assert len(dataset.examples) > 0.99 * dataset.rows


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


@pytest.mark.parametrize("words", [7, 8, 9, 15, 16])
def test_the_end_of_a_plain_text_is_learned_whatever_its_length(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, words: int
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"text": "p" * words}) + "\n")
    dataset = load_jsonl(file, tokenizer, None, None, 8)
    assert dataset.examples[-1].token_ids[-1] == tokenizer.eos_token_id
    whole = [token for example in dataset.examples for token in example.token_ids]
    assert len(whole) >= words
    assert all(len(example) <= 8 for example in dataset.examples)
