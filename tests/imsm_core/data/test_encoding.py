"""Prompts and answers as token ids: what transformers' own chat templates give, up to the end of the answer's turn."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from imsm_core.backbone import load_tokenizer
from imsm_core.data.encoding import Encoder, encode_answer, encode_prompt, end_of_turn, end_token
from imsm_core.data.forms import Message, Turn
from imsm_core.data.readers import BadRow
from imsm_core.errors import BaseModelError
from tests.builders import EOS, PAD, make_tokenizer

ASK: Message = {"role": "user", "content": "Hi"}
TURNS = [{"role": "system", "content": "Be brief."}, ASK, {"role": "assistant", "content": "Oh"}, ASK]
CHATML = (
    "{% for m in messages %}<pad>{{ m.role }}\n{{ m.content }}<pad>\n{% endfor %}"
    "{% if add_generation_prompt %}<pad>assistant\n{% endif %}"
)
TRIMMED = CHATML.replace("m.content", "m.content | trim")
LLAMA2 = (
    "{% for m in messages %}{{ '[I]' + m.content + '[/I]' if m.role != 'assistant' else m.content + ' </s>' }}"
    "{% endfor %}"
)
REFUSES = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no\nsystem') }}{% endif %}{% endfor %}x"
)
THINKS = CHATML.replace("<pad>assistant\n{% endif", "<pad>assistant\n<think>{% endif")


def test_prompt_gets_the_tokenizers_special_tokens_and_the_answer_its_end(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.decode(encode_prompt(tokenizer, "hi ")) == "<s>hi "
    assert tokenizer.decode(encode_answer(tokenizer, "you")) == "you</s>"


def test_chat_template_makes_the_prompt_a_users_turn(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    assert chat_tokenizer.decode(encode_prompt(chat_tokenizer, "hi")) == "[user]hi\n[assistant]"
    assert chat_tokenizer.decode(encode_prompt(chat_tokenizer, "hi", raw=True)) == "<s>hi"


@pytest.mark.parametrize("template", ["{{ raise_exception('a system\nturn is needed') }}", "{% if", "{{ 1 / 0 }}"])
def test_chat_template_that_fails_is_the_models_fault(tmp_path: Path, template: str) -> None:
    with pytest.raises(BaseModelError, match="chat template fails on a single user turn") as caught:
        encode_prompt(make_tokenizer(tmp_path, template), "hi")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("template", [CHATML, TRIMMED, LLAMA2])
def test_turns_are_encoded_as_transformers_does_and_the_answer_ends_where_the_template_ends_it(
    tmp_path: Path, template: str
) -> None:
    tokenizer = make_tokenizer(tmp_path, template)
    for content in ("Hello", "  Hello ", "a<s>b"):
        answer = {"role": "assistant", "content": content}
        whole = tokenizer.apply_chat_template([*TURNS, answer], return_dict=False)
        prompt = tokenizer.apply_chat_template(TURNS, return_dict=False, add_generation_prompt=True)
        prompt_ids, answer_ids = Encoder(tokenizer).turn(Turn(TURNS, content))
        assert prompt_ids == prompt
        assert prompt_ids + answer_ids == whole[: len(prompt_ids + answer_ids)]
        assert whole[len(prompt_ids + answer_ids) :] in ([], tokenizer("\n", add_special_tokens=False)["input_ids"])
        assert answer_ids[-1] == (EOS if template == LLAMA2 else PAD)


def test_the_token_that_ends_a_turn_is_found(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    for number, (template, end) in enumerate([(CHATML, "<pad>"), (LLAMA2, " </s>"), (REFUSES, ""), ("{% if", "")]):
        tokenizer = make_tokenizer(tmp_path / str(number), template)
        assert end_of_turn(tokenizer) == end
        assert end_token(tokenizer) == {"<pad>": PAD, " </s>": EOS}.get(end)
    assert end_token(chat_tokenizer) is None
    assert end_token(make_tokenizer(tmp_path / "none")) is None


def test_an_answer_that_the_template_does_not_end_gets_the_end_of_sequence(
    chat_tokenizer: PreTrainedTokenizerBase,
) -> None:
    prompt_ids, answer_ids = Encoder(chat_tokenizer).turn(Turn([ASK], "you"))
    assert chat_tokenizer.decode(prompt_ids) == "[user]Hi\n[assistant]"
    assert chat_tokenizer.decode(answer_ids) == "you</s>"


def test_an_answer_after_a_prompt_that_the_whole_conversation_does_not_begin_with(tmp_path: Path) -> None:
    """As where the prompt ends with the beginning of a thought."""
    tokenizer = make_tokenizer(tmp_path, THINKS)
    prompt_ids, answer_ids = Encoder(tokenizer).turn(Turn("Hi", "you"))
    assert tokenizer.decode(prompt_ids) == "<pad>user\nHi<pad>\n<pad>assistant\n<think>"
    assert tokenizer.decode(answer_ids) == "you<pad>"


def test_a_template_that_refuses_a_turn_makes_a_bad_row(tmp_path: Path) -> None:
    with pytest.raises(BadRow, match=r"^the chat template refuses the turns: no system$") as caught:
        Encoder(make_tokenizer(tmp_path, REFUSES)).turn(Turn(TURNS, "a"))
    assert caught.value.reason == "refused by the template"


def test_without_a_template_only_one_turn_of_a_user_can_be_encoded(
    tokenizer: PreTrainedTokenizerBase, chat_tokenizer: PreTrainedTokenizerBase
) -> None:
    expected = tokenizer("Hi")["input_ids"]
    assert Encoder(tokenizer).prompt([ASK]) == Encoder(chat_tokenizer, raw=True).prompt([ASK]) == expected
    for turns in (TURNS, TURNS[:1], TURNS[:2]):
        with pytest.raises(BadRow, match="come before an answer; without a chat template only one turn of a user can"):
            Encoder(tokenizer).prompt(turns)


def test_a_real_models_answers_end_as_its_own_template_ends_them(smollm2_folder: Path) -> None:
    tokenizer = load_tokenizer(str(smollm2_folder))
    answer = {"role": "assistant", "content": "Hello there."}
    whole = tokenizer.apply_chat_template([*TURNS, answer], return_dict=False)
    prompt_ids, answer_ids = Encoder(tokenizer).turn(Turn(TURNS, "Hello there."))
    assert prompt_ids + answer_ids == whole[:-1]
    assert tokenizer.decode(answer_ids) == "Hello there.<|im_end|>"


def test_gemmas_turns_end_with_a_token_that_is_not_the_end_of_sequence(gemma3_folder: Path) -> None:
    tokenizer = load_tokenizer(str(gemma3_folder))
    tokenizer.chat_template = CHATML.replace("<pad>\n{% endfor", "<end_of_turn>\n{% endfor")
    assert end_token(tokenizer) == tokenizer.convert_tokens_to_ids("<end_of_turn>") != tokenizer.eos_token_id
