"""LoHa (arXiv 2108.06098): (A1 B1) * (A2 B2), an elementwise product of two rank-r matrices.

Row i of the product is the sum over p, q of A1[i, p] A2[i, q] B1[p, :] B2[q, :], so that it is a low-rank change
of rank r * r, exactly; where that holds more numbers than the matrix itself, the matrix is stored.
"""

from __future__ import annotations

import torch
from torch import nn

from .rows import PeftLayer, linear_weight, smaller_form


def two_stream_loha(name: str, layer: PeftLayer, frozen: nn.Module, adapter: str) -> nn.Module | None:
    """The two-stream form of a PEFT LoHa layer on a linear layer."""
    weight = linear_weight(frozen)
    if adapter not in layer.hada_w1_a or adapter in layer.hada_t1 or weight is None:
        return None
    a1, b1 = layer.hada_w1_a[adapter].detach(), layer.hada_w1_b[adapter].detach()
    a2, b2 = layer.hada_w2_a[adapter].detach(), layer.hada_w2_b[adapter].detach()
    if a1.shape[0] != weight.shape[0]:
        return None
    up = torch.einsum("ip,iq->ipq", a1, a2).flatten(1) * layer.scaling[adapter]
    down = torch.einsum("pj,qj->pqj", b1, b2).flatten(0, 1)
    return smaller_form(frozen, down, up)
