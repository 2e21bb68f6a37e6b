"""The texts of an export: read as the adapter was trained, cut to the context, refused where a row cannot be used."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from export.errors import ExportError
from export.pipeline import export_checkpoint, export_model
from export.settings import ExportSettings
from export.texts import LONGEST, Texts, read_texts
from imsm_core.backbone import load_tokenizer
from imsm_core.checkpoint import CheckpointInfo, read_info
from imsm_core.data.dataset import Example
from imsm_core.data.encoding import Encoder
from imsm_core.data.forms import Turn
from imsm_core.errors import CheckpointError, DataError, SettingsError
from imsm_core.training.settings import TrainSettings, TuneSettings
from imsm_core.training.tuning import tune
from tests.builders import (
    CONTEXT,
    EOS,
    PAD,
    VOCABULARY,
    make_base_folder,
    make_siamese,
    save_tiny_checkpoint,
    write_jsonl,
)

INFO = CheckpointInfo("base", None, "0", "query_aware", 3, "LORA")
TURNS = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<pad>\n{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)


@pytest.fixture
def tokenizer(chat_folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(chat_folder))


def read(
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    trained: dict[str, Any] | None = None,
    context: int = 128,
    report: Any = lambda line: None,
    vocabulary: int = VOCABULARY,
    **settings: Any,
) -> Texts:
    info = replace(INFO, training=trained or {})
    return read_texts(ExportSettings(eval_data=path, **settings), tokenizer, info, context, vocabulary, report)


def test_plain_text_is_judged_after_its_first_tokens_and_cut(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "held.jsonl", [{"text": "abc"}, {"text": "d" * 2000}, {"text": "e"}])
    texts = read(tokenizer, path, eval_texts=2).evaluation
    assert [text.token_ids for text in texts] == [tokenizer(t)["input_ids"][:128] for t in ("abc", "d" * 2000)]
    assert [len(text.prompt_ids) for text in texts] == [3, 8]
    assert [len(text) for text in read(tokenizer, path, context=10**6).evaluation] == [4, LONGEST, 2]


@pytest.mark.parametrize(
    ("trained", "settings"),
    [
        ({"raw": True, "prompt_field": "question"}, {}),
        ({"raw": False}, {"raw": True, "prompt_field": "question"}),
        ({"raw": True, "prompt_field": "other", "answer_field": "answer"}, {"prompt_field": "question"}),
    ],
    ids=range(3),
)
def test_rows_are_read_as_the_adapter_was_trained_or_as_the_settings_say(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, trained: dict[str, Any], settings: dict[str, Any]
) -> None:
    path = write_jsonl(tmp_path / "held.jsonl", [{"question": "why", "answer": "so"}])
    expected = Example(*Encoder(tokenizer, raw=True).turn(Turn("why", "so")))
    assert read(tokenizer, path, trained, **settings).evaluation == [expected]
    calibrated = read(tokenizer, path, trained, precision="int4", calibrate=path, **settings)
    assert calibrated.calibration == [expected.token_ids]


def test_every_form_of_training_data_is_read(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """A checkpoint's own fields are no reason to refuse another form."""
    turns = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}]
    expected = Example(*Encoder(tokenizer).turn(Turn("why", "so")))
    rows: list[dict[str, object]] = [
        {"messages": turns},
        {"prompt": turns[:1], "completion": turns[1:]},
        {"instruction": "why", "output": "so"},
    ]
    for row in rows:
        path = write_jsonl(tmp_path / "held.jsonl", [row])
        assert read(tokenizer, path, {"prompt_field": "question"}).evaluation == [expected]
    with pytest.raises(DataError, match="line 1: it has no field 'question'"):
        read(tokenizer, path, prompt_field="question")


def test_an_answer_is_cut_and_a_prompt_that_leaves_no_room_for_one_is_left_out(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows: list[dict[str, object]] = [{"prompt": "p" * n, "answer": "abcdef"} for n in (5, 30, 200)]
    path, lines = write_jsonl(tmp_path / "held.jsonl", rows), list[str]()
    first, second = read(tokenizer, path, {"raw": True}, context=33, report=lines.append).evaluation
    assert tokenizer.decode(first.answer_ids) == "abcdef</s>"
    assert (len(second.prompt_ids), tokenizer.decode(second.answer_ids)) == (31, "ab")
    assert lines == [f"data      {path}: rows that are skipped: 1 too long"]
    with pytest.raises(DataError, match="has no texts: all rows are skipped"):
        read(tokenizer, path, {"raw": True}, context=6)
    assert read(tokenizer, path, {"raw": True}, context=33, eval_texts=1).evaluation == [first]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([{"story": "abc"}], "line 1: no form is known that has 'story'"),
        ([{"text": "abc"}, {"prompt": "abc", "answer": "d"}], "line 2: it has no field 'text'"),
        ([{"text": "abc"}, {"text": 5}], "line 2: field 'text' is a number, not text"),
        ([{"text": "abc"}, {"text": ""}], "line 2: field 'text' is empty"),
        ([{"prompt": "abc", "answer": "~"}], "line 1: its token '~' has the id"),
    ],
)
def test_bad_rows_are_refused_by_their_line(
    rows: list[dict[str, object]], message: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "held.jsonl", rows)
    with pytest.raises(DataError, match=message):
        read(tokenizer, path, {"raw": True}, vocabulary=tokenizer.get_vocab()["~"])


def test_bad_rows_are_skipped_and_counted(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"story": "a"}, {"text": "good"}, {"text": 5}, {"text": 6}, {"text": "too"}]
    path, lines = write_jsonl(tmp_path / "held.jsonl", rows), list[str]()
    texts = read(tokenizer, path, skip_bad_rows=True, report=lines.append).evaluation
    assert [tokenizer.decode(text.token_ids) for text in texts] == ["<s>good", "<s>too"]
    assert lines == [f"data      {path}: rows that are skipped: 2 not text, 1 unknown form"]


def test_settings_without_data_and_damaged_checkpoints_are_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    given: list[dict[str, Any]] = [{"prompt_field": "x"}, {"answer_field": "x"}, {"skip_bad_rows": True}]
    for settings in given:
        with pytest.raises(SettingsError, match=f"^{next(iter(settings))} is .*; it needs eval_data or calibrate"):
            ExportSettings(**settings)
    path = write_jsonl(tmp_path / "held.jsonl", [{"text": "abc"}])
    with pytest.raises(CheckpointError, match="is damaged: prompt_field of its training is 5"):
        read(tokenizer, path, {"prompt_field": 5})
    with pytest.raises(ExportError, match="nothing to predict"):
        read(tokenizer, path, context=1)
    with pytest.raises(DataError, match="cannot read"):
        read(tokenizer, tmp_path / "none.jsonl")


def test_an_adapter_of_raw_prompts_is_measured_on_raw_prompts(tmp_path: Path) -> None:
    """From the training's options to the manifest, with nothing said twice."""
    base = make_base_folder(tmp_path / "base", chat_template=TURNS)
    rows: list[dict[str, object]] = [{"question": f"What is {n}?", "answer": f"It is {n}."} for n in range(4)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    trained = TuneSettings(prompt_field="question", raw=True, adapter_rank=2)
    tune(str(base), data, tmp_path / "checkpoint", trained, TrainSettings(steps=1), progress=False)
    info = read_info(tmp_path / "checkpoint")
    assert {name: info.training[name] for name in ("prompt_field", "answer_field", "raw")} == {
        "prompt_field": "question",
        "answer_field": None,
        "raw": True,
    }
    lines: list[str] = []
    settings = ExportSettings(eval_data=data)
    manifest = export_checkpoint(tmp_path / "checkpoint", tmp_path / "artifact", settings, report=lines.append)
    tokens = sum(len(f"<{row['question']}") for row in rows)
    answers = sum(len(f"{row['answer']}>") for row in rows)  # a byte is a token
    assert f"quality   measuring on 4 texts of {tokens + answers} tokens, {answers} of which are judged" in lines
    assert (manifest["quality"]["texts"], manifest["quality"]["tokens"]) == (4, answers)
    assert manifest["prompts"]["raw"] is True


def test_plain_text_trains_prompts_as_they_are(tmp_path: Path) -> None:
    base = make_base_folder(tmp_path / "base", chat_template=TURNS)
    data = write_jsonl(tmp_path / "rows.jsonl", [{"text": "Once upon a time"}])
    tune(str(base), data, tmp_path / "checkpoint", TuneSettings(), TrainSettings(steps=1), progress=False)
    info = read_info(tmp_path / "checkpoint")
    assert info.training["raw"] is True
    assert {**info.data, "sha256": ""} == {
        "path": str(data),
        "sha256": "",
        "form": "text",
        "rows": 1,
        "examples": 1,
        "skipped": {},
    }


def test_the_token_that_ends_the_templates_turns_ends_generation(tmp_path: Path) -> None:
    base = make_base_folder(tmp_path / "base", chat_template=TURNS)
    model = make_siamese(base)
    info = save_tiny_checkpoint(model, base, tmp_path / "checkpoint")
    settings = ExportSettings(context_length=CONTEXT, raw=True)
    manifest = export_model(model, load_tokenizer(str(base)), info, tmp_path / "a", settings, report=lambda line: None)
    assert manifest["tokens"]["eos_token_ids"] == [EOS, PAD]
    assert manifest["prompts"]["raw"] is True
