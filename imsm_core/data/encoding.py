"""Token ids of a prompt and of an answer. The runtime encodes prompts in the same way."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from ..errors import BaseModelError
from .forms import Message, Turn
from .readers import BadRow

_PROBE = "imsmanswer"  # a word that no template has


class Encoder:
    """A tokenizer and how prompts are made: by its chat template, or `raw`, which is also what a tokenizer without one
    gets."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, raw: bool = False) -> None:
        self.tokenizer = tokenizer
        self.raw = raw or not tokenizer.chat_template

    def prompt(self, prompt: str | Sequence[Message]) -> list[int]:
        """Token ids of a prompt. Through the chat template: of text as one user's turn, up to where the assistant's
        turn begins. Else as plain text, with the special tokens that the tokenizer adds.

        Raises BaseModelError if the template cannot render one user's turn, BadRow if it refuses these turns, or if
        there are several and no template is used.
        """
        return self._ids(self._rendered(prompt)) if not self.raw else self._plain(prompt)

    def turn(self, turn: Turn) -> tuple[list[int], list[int]]:
        """Token ids of a prompt, as `prompt`, and of its answer with the token that ends it: as the chat template
        writes them, or else the answer's text and the end-of-sequence token. Raises as `prompt`."""
        if self.raw:
            return self._plain(turn.prompt), encode_answer(self.tokenizer, turn.answer)
        before = self._rendered(turn.prompt)
        prompt_ids = self._ids(before)
        return prompt_ids, self._templated_answer(turn, before, prompt_ids)

    @cached_property
    def end_of_turn(self) -> str:
        """What the chat template writes after an answer, up to the first special token, which ends it; empty if there
        is none."""
        return "" if self.raw else end_of_turn(self.tokenizer)

    def _templated_answer(self, turn: Turn, before: str, prompt_ids: list[int]) -> list[int]:
        whole, end = self._whole(turn), self.end_of_turn
        place = whole.rfind(end) if end else -1
        if whole.startswith(before) and place >= len(before):
            whole = whole[: place + len(end)]
            ids = self._ids(whole)
            if ids[: len(prompt_ids)] == prompt_ids:
                return ids[len(prompt_ids) :]
            return self._ids(whole[len(before) :])  # as it continues a prompt that was tokenized alone
        return self._ids(turn.answer + end) if end else encode_answer(self.tokenizer, turn.answer)

    def _whole(self, turn: Turn) -> str:
        """The conversation with the answer in it, as the template writes it; empty if the template refuses it."""
        messages = [*_messages(turn.prompt), {"role": "assistant", "content": turn.answer}]
        try:
            return _render(self.tokenizer, messages, add_generation_prompt=False)
        except Exception:  # whatever a template raises: it is a program
            return ""

    def _rendered(self, prompt: str | Sequence[Message]) -> str:
        try:
            return _render(self.tokenizer, _messages(prompt), add_generation_prompt=True)
        except Exception as error:  # as in _whole
            reason = " ".join(str(error).split()) or type(error).__name__
            if isinstance(prompt, str):
                raise BaseModelError(f"the tokenizer's chat template fails on a single user turn: {reason}") from error
            raise BadRow("refused by the template", f"the chat template refuses the turns: {reason}") from error

    def _plain(self, prompt: str | Sequence[Message]) -> list[int]:
        if not isinstance(prompt, str):
            if [message["role"] for message in prompt] != ["user"]:
                roles = ", ".join(message["role"] for message in prompt)
                raise BadRow(
                    "needs a chat template",
                    f"turns of {roles} come before an answer; without a chat template only one turn of a user can",
                )
            prompt = prompt[0]["content"]
        ids: list[int] = self.tokenizer(prompt)["input_ids"]
        return ids

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, raw: bool = False) -> list[int]:
    """Token ids of a prompt as `Encoder.prompt` makes them."""
    return Encoder(tokenizer, raw).prompt(prompt)


def encode_answer(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """Token ids of plain text and the end-of-sequence token, so that the model learns to stop."""
    ids: list[int] = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the tokenizer's chat template writes after an answer, up to and including the first special token; empty
    without one, or without a template that renders a user's turn and an answer."""
    if not tokenizer.chat_template:
        return ""
    try:
        text = _render(tokenizer, [*_messages("?"), {"role": "assistant", "content": _PROBE}], False)
    except Exception:  # as in Encoder._whole
        return ""
    after = text.rpartition(_PROBE)[2] if _PROBE in text else ""
    ends = [str(token) for token in tokenizer.added_tokens_decoder.values() if str(token).strip()]
    found = [(place, -len(end)) for end in ends if (place := after.find(end)) >= 0]
    if not found:
        return ""
    place, length = min(found)
    return after[: place - length]


def end_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token with which answers end in the tokenizer's chat template, None if there is none."""
    end = end_of_turn(tokenizer)
    return tokenizer(end, add_special_tokens=False)["input_ids"][-1] if end else None


def _messages(prompt: str | Sequence[Message]) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], add_generation_prompt: bool) -> str:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    assert isinstance(text, str)
    text.encode()  # half a surrogate pair, which a template may make of an index, has no tokens
    return text
