"""Prompts and answers as token ids."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from imsm_core.data.encoding import encode_answer, encode_prompt
from imsm_core.errors import BaseModelError
from tests.builders import make_tokenizer


def test_prompt_gets_the_tokenizers_special_tokens_and_the_answer_its_end(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.decode(encode_prompt(tokenizer, "hi ")) == "<s>hi "
    assert tokenizer.decode(encode_answer(tokenizer, "you")) == "you</s>"


def test_chat_template_makes_the_prompt_a_users_turn(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    assert chat_tokenizer.decode(encode_prompt(chat_tokenizer, "hi")) == "[user]hi\n[assistant]"
    assert chat_tokenizer.decode(encode_prompt(chat_tokenizer, "hi", raw=True)) == "<s>hi"
    assert chat_tokenizer.decode(encode_answer(chat_tokenizer, "you")) == "you</s>"


@pytest.mark.parametrize("template", ["{{ raise_exception('a system turn is needed') }}", "{% if"])
def test_chat_template_that_fails_is_the_models_fault(tmp_path: Path, template: str) -> None:
    with pytest.raises(BaseModelError, match="chat template fails on a single user turn"):
        encode_prompt(make_tokenizer(tmp_path, template), "hi")
