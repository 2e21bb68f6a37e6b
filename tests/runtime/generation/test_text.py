"""Text to tokens and back: whole characters, prompts as transformers encodes them, and one line for what fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from runtime.errors import ArtifactError, PromptError
from runtime.generation.text import TextCodec
from tests.builders import CHAT_TEMPLATE, make_tokenizer

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TEXTS = ["plain", "Ünïcödé – 東京 🦊🦊 end", " leading and trailing ", "a\nb\tc", "👩‍👩‍👧"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("codec")
    make_tokenizer(folder, CHAT_TEMPLATE)
    return folder


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_is_the_whole_text_in_whole_characters(folder: Path, text: str) -> None:
    codec = TextCodec(folder, SPECIAL)
    tokens = codec.tokenizer.encode(text, add_special_tokens=False).ids
    stream = codec.stream()
    pieces = [stream.push(token) for token in tokens]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + stream.finish() == codec.decode(tokens) == text


def test_text_that_ends_inside_a_character_ends_as_the_tokenizer_decodes_it(folder: Path) -> None:
    codec = TextCodec(folder, SPECIAL)
    tokens = codec.tokenizer.encode("ok 🦊", add_special_tokens=False).ids[:-2]
    stream = codec.stream()
    pieces = [stream.push(token) for token in tokens]
    assert "".join(pieces) == "ok "
    assert "".join(pieces) + stream.finish() == codec.decode(tokens)


def test_a_real_tokenizer_streams_what_it_decodes(stories_folder: Path) -> None:
    codec = TextCodec(stories_folder, SPECIAL)
    tokens = codec.tokenizer.encode("Once upon a time, Ünï 🦊 went home.").ids
    stream = codec.stream()
    assert "".join(map(stream.push, tokens)) + stream.finish() == codec.decode(tokens)


def test_special_tokens_are_not_text(folder: Path) -> None:
    codec = TextCodec(folder, SPECIAL)
    stream = codec.stream()
    letter = codec.tokenizer.token_to_id("h")
    assert letter is not None
    assert [stream.push(token) for token in (0, letter, 1)] == ["", "h", ""]


def test_raw_prompts_are_encoded_as_transformers_encodes_them(folder: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(str(folder))
    assert TextCodec(folder, SPECIAL).encode_prompt("Hello 🦊", raw=True) == theirs("Hello 🦊")["input_ids"]


def test_chat_prompts_are_encoded_as_transformers_encodes_them(folder: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(str(folder))
    messages = [{"role": "user", "content": "Hello"}]
    expected: Any = theirs.apply_chat_template(messages, add_generation_prompt=True)
    assert TextCodec(folder, SPECIAL).encode_prompt("Hello") == expected["input_ids"]


def test_what_a_tokenizer_cannot_do_is_one_line(folder: Path, tmp_path: Path) -> None:
    codec = TextCodec(folder, SPECIAL)
    with pytest.raises(PromptError, match=r"character 6 is '.ud800', which UTF-8"):
        codec.encode_prompt("lone \ud800 surrogate", raw=True)
    for ids in ([-1], [2**32], [2**70]):
        with pytest.raises(PromptError, match="token ids are whole numbers"):
            codec.decode(ids)
    assert codec.decode([300, 10**9]) == ""
    document = json.loads((folder / "tokenizer.json").read_text())
    unknown = {"model": {"type": "Unigram", "unk_id": None, "vocab": [["a", 0.0]]}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document | unknown))
    with pytest.raises(PromptError, match="cannot encode the prompt") as caught:
        TextCodec(tmp_path, SPECIAL).encode_prompt("time")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"version": "1.0"}', "\x00\xff"])
def test_a_tokenizer_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtifactError, match=r"cannot read .*tokenizer\.json") as caught:
        TextCodec(tmp_path, SPECIAL)
    assert "\n" not in str(caught.value)


def test_a_template_that_is_not_utf_8_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe{{ messages }}")
    with pytest.raises(ArtifactError, match=r"cannot read .*chat_template\.jinja: UnicodeDecodeError"):
        TextCodec(tmp_path, SPECIAL)


def test_prompts_are_encoded_as_the_model_was_tuned(folder: Path) -> None:
    chat, raw = TextCodec(folder, SPECIAL), TextCodec(folder, SPECIAL, raw=True)
    assert raw.encode_prompt("Hello") == chat.encode_prompt("Hello", raw=True) != chat.encode_prompt("Hello")
    assert raw.encode_prompt("Hello", raw=False) == chat.encode_prompt("Hello")


def test_an_empty_prompt_is_refused(folder: Path) -> None:
    with pytest.raises(PromptError, match="empty"):
        TextCodec(folder, SPECIAL).encode_prompt("")
