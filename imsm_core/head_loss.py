"""The cross-entropy of many positions without the logits of all of them in memory at once.

The head runs on a piece of the positions at a time. In training the logits of a piece are computed again on the way
back (torch.utils.checkpoint), so that memory does not grow with the vocabulary times the number of positions.
`torch.nn.functional.linear_cross_entropy` does as much for a bare matrix; a head may also scale or cap its logits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from .backbone import apply_head, embedded_tokens

PIECE_BYTES = 2**26  # of one float32 array of logits; the loss and its gradient need about three


def pieces(model: PreTrainedModel, positions: int) -> Iterator[slice]:
    """Slices of `positions`, in each of which the logits take at most PIECE_BYTES, or that hold one position."""
    size = max(1, PIECE_BYTES // (4 * embedded_tokens(model)))
    return (slice(start, start + size) for start in range(0, positions, size))


def summed_loss(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """(): the sum of the cross-entropies (nats) of targets (M,) int64 after the last hidden states (M, d)."""
    parts = list(pieces(model, len(targets)))
    if len(parts) < 2 or not torch.is_grad_enabled():
        losses = [_loss(model, hidden[part], targets[part]) for part in parts]
    else:
        losses = [
            checkpoint(_loss, model, hidden[part], targets[part], use_reentrant=False, preserve_rng_state=False)
            for part in parts
        ]
    return torch.stack(losses).sum()


def _loss(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    logits = apply_head(model, hidden[None])[0]
    return functional.cross_entropy(logits.float(), targets, reduction="sum")
