"""How well a siamese model, or one of its streams alone, answers a list of examples.

Runs the gate and the lm_head on answer positions only, and decodes nothing: a greedy answer equals the expected one
exactly when every expected token is the argmax after the expected tokens before it, and one pass over prompt and
answer shows whether they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from .backbone import apply_head
from .data.collate import IGNORED_LABEL, collate
from .data.dataset import Example
from .errors import DataError, SettingsError
from .head_loss import pieces
from .siamese import SiameseModel

Stream = Literal["base", "adapter", "fused"]
"""Which state goes to the lm_head: the base stream's, the adapter stream's, or the gate's blend of the two."""


@dataclass(frozen=True)
class Evaluation:
    """loss: mean cross-entropy of the answer tokens, nats/token (the end token is one of them).
    accuracy: share of the examples whose whole answer greedy decoding reproduces, in [0, 1]."""

    loss: float
    accuracy: float
    examples: int
    answer_tokens: int


@torch.no_grad()
def evaluate(
    model: SiameseModel,
    examples: Sequence[Example],
    stream: Stream,
    pad_token_id: int,
    memory_bias: float = 0.0,
    batch_size: int = 64,
) -> Evaluation:
    """Loss and exact-match accuracy of one stream over `examples`, in eval mode (restored afterwards).

    memory_bias: added before the gate's sigmoid; it only changes the fused stream. Raises SettingsError for an
    unknown stream or a batch size below 1, DataError if an example has no answer or there are no examples.
    """
    _check(examples, stream, batch_size)
    loss, tokens, correct = 0.0, 0, 0
    was_training = model.training
    model.eval()
    try:
        for batch in _batches(examples, batch_size):
            states, targets, rows = answer_states(model, batch, stream, pad_token_id, memory_bias)
            wrong = torch.zeros(len(batch), dtype=torch.bool, device=states.device)
            for part in pieces(model.causal_lm, len(targets)):
                logits = apply_head(model.causal_lm, states[part][None])[0].float()
                loss += float(functional.cross_entropy(logits, targets[part], reduction="sum"))
                wrong[rows[part][logits.argmax(-1) != targets[part]]] = True
            tokens += len(targets)
            correct += len(batch) - int(wrong.sum())
    finally:
        model.train(was_training)
    return Evaluation(loss / tokens, correct / len(examples), len(examples), tokens)


def answer_states(
    model: SiameseModel, examples: Sequence[Example], stream: Stream, pad_token_id: int, memory_bias: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """One stream's last hidden states (M, d) that predict the M answer tokens of `examples`, given all tokens before
    each; the answers' token ids (M,) int64; and the example that each belongs to (M,) int64, an index into `examples`.
    """
    states, targets, rows = states_by_stream(model, examples, (stream,), pad_token_id, memory_bias)
    return states[stream], targets, rows


def states_by_stream(
    model: SiameseModel,
    examples: Sequence[Example],
    streams: Sequence[Stream],
    pad_token_id: int,
    memory_bias: float = 0.0,
) -> tuple[dict[Stream, Tensor], Tensor, Tensor]:
    """`answer_states` of several streams, for which the backbone reads the examples once."""
    device = next(model.parameters()).device
    input_ids, attention_mask, query_mask, labels = (part.to(device) for part in collate(examples, pad_token_id))
    states = model.stream_states(input_ids, attention_mask)
    rows, positions = torch.nonzero(labels[:, 1:] != IGNORED_LABEL, as_tuple=True)  # a state predicts the next token
    chosen: dict[Stream, Tensor] = {}
    for stream in streams:
        if stream == "fused":
            chosen[stream] = model.fused_states(states, query_mask, rows, positions, memory_bias).fused
        else:
            chosen[stream] = (states.base if stream == "base" else states.adapter)[rows, positions]
    return chosen, labels[rows, positions + 1], rows


def _check(examples: Sequence[Example], stream: str, batch_size: int) -> None:
    if stream not in get_args(Stream):
        raise SettingsError("stream", stream, f"choose one of {', '.join(get_args(Stream))}")
    if batch_size < 1:
        raise SettingsError("batch_size", batch_size, "it must be at least 1")
    if not examples:
        raise DataError("there is nothing to evaluate: no examples were given")
    for number, example in enumerate(examples, 1):
        if not example.answer_ids:
            raise DataError(f"example {number} of {len(examples)} has no answer tokens to evaluate")


def _batches(examples: Sequence[Example], batch_size: int) -> list[list[Example]]:
    """Examples of similar length together, so that little is computed on padding."""
    ordered = sorted(examples, key=len)
    return [ordered[first : first + batch_size] for first in range(0, len(ordered), batch_size)]
