"""Padded batches of examples, with the labels that the loss and the evaluation read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .dataset import Example

IGNORED_LABEL = -100


class Batch(NamedTuple):
    """input_ids, attention_mask, query_mask: (B, S), right-padded. labels: (B, S), -100 where nothing is learned;
    labels[b, t] is the token at t itself (the loss shifts)."""

    input_ids: Tensor
    attention_mask: Tensor
    query_mask: Tensor
    labels: Tensor


def collate(examples: Sequence[Example], pad_token_id: int) -> Batch:
    """Right-pad to the longest example."""
    length = max(len(example) for example in examples)
    input_ids = torch.full((len(examples), length), pad_token_id, dtype=torch.int64)
    attention_mask, query_mask = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED_LABEL)
    for row, example in enumerate(examples):
        prompt_end, end = len(example.prompt_ids), len(example)
        input_ids[row, :end] = torch.tensor(example.token_ids)
        attention_mask[row, :end] = 1
        query_mask[row, :prompt_end] = 1
        labels[row, prompt_end:end] = input_ids[row, prompt_end:end]
    return Batch(input_ids, attention_mask, query_mask, labels)
