"""The oracle: uncached two-stream greedy decoding, written to be obviously right, not fast.

Every token re-runs both streams over the whole text, so there is no cache, no chunk and no mask to get wrong. The
parity tests and the exporter's verification compare everything else with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .siamese import SiameseModel


class ReferenceStep(NamedTuple):
    """One position: logits (vocab,), gate (d,), hidden_base (d,), hidden_adapter (d,), all float32, and the token
    that greedy decoding picks."""

    logits: Tensor
    gate: Tensor
    hidden_base: Tensor
    hidden_adapter: Tensor
    token: int


@torch.no_grad()
def reference_step(
    model: SiameseModel, tokens: Sequence[int], prompt_length: int, memory_bias: float = 0.0
) -> ReferenceStep:
    """The step that follows `tokens`, of which the first `prompt_length` are the prompt (the query)."""
    input_ids = torch.tensor([list(tokens)], device=next(model.parameters()).device)
    query_mask = torch.zeros_like(input_ids)
    query_mask[:, :prompt_length] = 1
    states = model.stream_states(input_ids)
    row, last = torch.tensor([0]), torch.tensor([len(tokens) - 1])
    logits, gated = model.fused_logits(states, query_mask, row, last, memory_bias)
    return ReferenceStep(
        logits[0].float(),
        gated.gate[0],
        states.base[0, -1].float(),
        states.adapter[0, -1].float(),
        int(logits[0].argmax()),
    )


def reference_generate(
    model: SiameseModel,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    eos_token_ids: Sequence[int] = (),
    memory_bias: float = 0.0,
) -> list[ReferenceStep]:
    """Greedy decoding; stops after a step whose token is in `eos_token_ids`, or after `max_new_tokens` steps."""
    model.eval()
    tokens = list(prompt_ids)
    steps: list[ReferenceStep] = []
    while len(steps) < max_new_tokens and not (steps and steps[-1].token in eos_token_ids):
        steps.append(reference_step(model, tokens, len(prompt_ids), memory_bias))
        tokens.append(steps[-1].token)
    return steps
