"""LoKr (arXiv 2309.14859): a change kron(w1, w2), applied factor by factor and never built.

With x cut into rows X (in1, in2): kron(w1, w2) x = w1 X w2^T, read row by row.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .rows import ADAPTER_ROWS, PeftLayer, constant, linear_weight


class TwoStreamKronecker(nn.Module):
    """w1: (out1, in1), w2: (out2, in2) with the scale folded in; out = out1 * out2, in = in1 * in2."""

    form = "Kronecker"

    def __init__(self, base_layer: nn.Module, w1: Tensor, w2: Tensor) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapter_w1 = constant(w1)
        self.adapter_w2 = constant(w2)

    def forward(self, x: Tensor) -> Tensor:
        """x: (2 * B, S, in) or (2 * B * S, in) -> the same with out."""
        parts = (x * ADAPTER_ROWS.mask_for(x)).reshape(*x.shape[:-1], self.adapter_w1.shape[1], -1)
        change = torch.matmul(self.adapter_w1, torch.matmul(parts, self.adapter_w2.T))
        y: Tensor = self.base_layer(x) + change.flatten(-2)
        return y


def two_stream_lokr(name: str, layer: PeftLayer, frozen: nn.Module, adapter: str) -> nn.Module | None:
    """The two-stream form of a PEFT LoKr layer on a linear layer."""
    weight = linear_weight(frozen)
    if weight is None or adapter in layer.lokr_t2:
        return None
    w1, w2 = _factor(layer, "lokr_w1", adapter), _factor(layer, "lokr_w2", adapter)
    if w1 is None or w2 is None or w1.dim() != 2 or w2.dim() != 2:
        return None
    if (w1.shape[0] * w2.shape[0], w1.shape[1] * w2.shape[1]) != tuple(weight.shape):
        return None
    return TwoStreamKronecker(frozen, w1, w2 * layer.scaling[adapter])


def _factor(layer: PeftLayer, name: str, adapter: str) -> Tensor | None:
    """A factor, whole or itself in two parts."""
    whole = getattr(layer, name)
    if adapter in whole:
        found: Tensor = whole[adapter].detach()
        return found
    first, second = getattr(layer, f"{name}_a"), getattr(layer, f"{name}_b")
    return (first[adapter] @ second[adapter]).detach() if adapter in first else None
