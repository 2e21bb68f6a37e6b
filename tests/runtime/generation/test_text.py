"""Text to tokens and back: streaming that never cuts a character, and chat templates as transformers renders them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from runtime.errors import ArtifactError, PromptError
from runtime.generation.chat_template import compile_template, render_chat
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


TEMPLATES = [
    "{{ bos_token }}{% for m in messages %}\n  {%- if m.role == 'user' %}U: {{ m.content | trim }}\n{% endif %}\n"
    "{% endfor %}",
    "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{{ m | tojson }}{% endfor %}",
    "{% generation %}{{ messages[0]['content'] }}{% endgeneration %}{% if add_generation_prompt %}A:{% endif %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ eos_token }}"
    "",
]


@pytest.mark.parametrize("source", TEMPLATES)
def test_templates_render_as_transformers_renders_them(folder: Path, source: str) -> None:
    theirs = AutoTokenizer.from_pretrained(str(folder))
    messages = [{"role": "user", "content": " é <b> "}, {"role": "assistant", "content": "x"}]
    expected = theirs.apply_chat_template(messages, chat_template=source, tokenize=False, add_generation_prompt=True)
    assert render_chat(compile_template(source), messages, SPECIAL) == expected


def test_a_template_that_refuses_is_one_error() -> None:
    with pytest.raises(PromptError, match="only one system"):
        render_chat(compile_template("{{ raise_exception('only one system') }}"), [], SPECIAL)


def test_a_broken_template_is_one_error() -> None:
    with pytest.raises(ArtifactError, match=r"chat_template\.jinja is not valid"):
        compile_template("{% if %}")


def test_an_empty_prompt_is_refused(folder: Path) -> None:
    with pytest.raises(PromptError, match="empty"):
        TextCodec(folder, SPECIAL).encode_prompt("")
