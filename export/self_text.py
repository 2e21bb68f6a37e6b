"""Text that the model writes by itself: what its layers read, without anybody's data.

Data-free calibration (Liu et al. 2023, arXiv 2305.17888, section 2): tokens are drawn from the model's own
distribution, unchanged, so that the text is as likely to it as its predictions say.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from imsm_core.backbone import embedded_tokens
from imsm_core.base_source import quiet_libraries
from imsm_core.data.encoding import encode_prompt
from imsm_core.errors import BaseModelError, first_line
from imsm_core.siamese import SiameseModel

from .replaced import replaced

ROWS, LENGTH = 32, 128
"""Texts, and tokens of each: half of the texts are the base stream's, half the adapter stream's."""


@torch.no_grad()
def own_texts(
    model: SiameseModel,
    tokenizer: PreTrainedTokenizerBase,
    starts: Sequence[str],
    longest: int,
    report: Callable[[str], None],
    rows: int = ROWS,
    seed: int = 0,
) -> list[list[int]]:
    """`rows` texts of at most `longest` tokens (LENGTH, if that is less), the same ones for the same seed: a
    quarter of each stream's as answers of a chat to one of `starts`, where the tokenizer has a template, the others
    from the beginning. Where a model cannot generate, tokens are random and a line says why."""
    length = min(longest, LENGTH)
    texts: list[list[int]] = []
    failures: list[str] = []
    with torch.random.fork_rng(devices=[]), quiet_libraries():
        torch.manual_seed(seed)
        for adapted in (False, True):
            with nullcontext() if adapted else model.adapter_disabled():
                for prompts in _prompts(model, tokenizer, starts, rows // 2):
                    texts += _continued(model, prompts, length, failures)
    if failures:
        report(f"round     this model cannot write texts ({failures[0]}); random tokens take their place")
    return texts


def _prompts(
    model: SiameseModel, tokenizer: PreTrainedTokenizerBase, starts: Sequence[str], rows: int
) -> Iterator[list[list[int]]]:
    """Prompts of one length each."""
    known = embedded_tokens(model.causal_lm)
    templated: list[int] = []
    if tokenizer.chat_template:
        with contextlib.suppress(BaseModelError):  # a template that takes other turns
            templated = [token for token in encode_prompt(tokenizer, starts[0]) if token < known]
    chats = rows // 4 if templated else 0
    if chats:
        yield [templated] * chats
    first = tokenizer.bos_token_id
    firsts = [first] if first is not None and first < known else _first_tokens(tokenizer, starts, known)
    yield [[firsts[row % len(firsts)]] for row in range(rows - chats)]


def _first_tokens(tokenizer: PreTrainedTokenizerBase, starts: Sequence[str], known: int) -> list[int]:
    found = [token for start in starts for token in tokenizer(start)["input_ids"][:1] if token < known]
    return found or [0]


def _continued(model: SiameseModel, prompts: list[list[int]], length: int, failures: list[str]) -> list[list[int]]:
    """failures: gets why random tokens took the place of the model's."""
    prompts = [prompt[: max(1, length - 1)] for prompt in prompts]
    room = length - len(prompts[0])
    ends = model.causal_lm.generation_config.eos_token_id  # which are not drawn: texts of one length
    drawn = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
    config = GenerationConfig(max_new_tokens=room, min_new_tokens=room, eos_token_id=ends, pad_token_id=0, **drawn)
    token_ids = torch.tensor(prompts)
    every = torch.ones_like(token_ids)  # also a first token that is the one for padding
    try:
        generate: Any = model.causal_lm.generate
        with replaced(model.causal_lm, "generation_config", GenerationConfig()):  # it may penalize or filter tokens
            found: list[list[int]] = generate(token_ids, attention_mask=every, generation_config=config).tolist()
    except Exception as error:
        failures.append(first_line(error))
        found = torch.randint(embedded_tokens(model.causal_lm), (len(prompts), length)).tolist()
    return found
