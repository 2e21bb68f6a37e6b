"""AdaLoRA (arXiv 2303.10512): W x + scaling / rank * P diag(E) Q x, a low-rank change once E is folded in.

Ranks that the training gave up, whose E is 0, are left out of the graph.
"""

from __future__ import annotations

from torch import nn

from .rows import LowRank, PeftLayer, linear_weight

RANK_OFFSET = 1e-5  # what PEFT adds to the rank before it divides by it


def two_stream_adalora(name: str, layer: PeftLayer, frozen: nn.Module, adapter: str) -> nn.Module | None:
    """The two-stream form of a PEFT AdaLoRA layer on a linear layer."""
    if adapter not in layer.lora_A or linear_weight(frozen) is None:
        return None
    singular = layer.lora_E[adapter].detach()[:, 0]
    scale = layer.scaling[adapter] / (float(layer.ranknum[adapter]) + RANK_OFFSET)
    kept = singular.nonzero()[:, 0]
    if not len(kept):
        return frozen
    a = layer.lora_A[adapter].detach()[kept]
    b = layer.lora_B[adapter].detach()[:, kept] * singular[kept] * scale
    return LowRank(frozen, a, b)
