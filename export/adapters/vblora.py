"""VB-LoRA (arXiv 2405.15179): a LoRA whose A and B are mixed from one bank of vectors; a low-rank change once mixed."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .rows import LowRank, PeftLayer, linear_weight


def two_stream_vblora(name: str, layer: PeftLayer, frozen: nn.Module, adapter: str) -> nn.Module | None:
    """The two-stream form of a PEFT VB-LoRA layer on a linear layer."""
    if adapter not in layer.vblora_logits_A or linear_weight(frozen) is None:
        return None
    bank, topk = layer.vblora_vector_bank[adapter].detach(), layer.topk[adapter]
    a = _mixed(layer.vblora_logits_A[adapter].detach(), bank, topk)  # (r, tiles, length)
    b = _mixed(layer.vblora_logits_B[adapter].detach(), bank, topk)  # (tiles, r, length)
    return LowRank(frozen, a.flatten(1), b.transpose(1, 2).flatten(0, 1))


def _mixed(logits: Tensor, bank: Tensor, topk: int) -> Tensor:
    """logits: (..., vectors) -> (..., length): the `topk` best vectors of the bank, weighted by their softmax."""
    best, chosen = logits.topk(topk, dim=-1)
    return (functional.softmax(best, dim=-1)[..., None] * bank[chosen]).sum(-2).to(torch.float32)
