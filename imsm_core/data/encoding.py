"""Token ids of a prompt and of an answer. The runtime encodes prompts in the same way."""

from __future__ import annotations

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..errors import BaseModelError


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, raw: bool = False) -> list[int]:
    """Token ids of a prompt: as one user turn of the tokenizer's chat template if it has one, else as plain text with
    the special tokens that the tokenizer adds. Raises BaseModelError if the
    template cannot render one user turn."""
    if raw or not tokenizer.chat_template:
        ids: list[int] = tokenizer(prompt)["input_ids"]
        return ids
    turns = [{"role": "user", "content": prompt}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError) as error:
        raise BaseModelError(f"the tokenizer's chat template fails on a single user turn: {error}") from error
    chat_ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return chat_ids


def encode_answer(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """Token ids of an answer and the end-of-sequence token, so that the model learns to stop."""
    ids: list[int] = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]
