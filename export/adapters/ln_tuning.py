"""LN-tuning (arXiv 2312.11420): trained copies of the norms, each on the adapter's rows."""

from __future__ import annotations

from torch import nn

from .fallback import SplitRows
from .rows import PeftLayer


def two_stream_norm(name: str, layer: PeftLayer, frozen: nn.Module, adapter: str) -> nn.Module | None:
    """The two-stream form of a norm that PEFT's LN-tuning copied."""
    if adapter not in layer.ln_tuning_layers:
        return frozen
    return SplitRows(frozen, layer.ln_tuning_layers[adapter])
