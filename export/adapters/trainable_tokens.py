"""Trained rows of the embedding, as a separate method or beside another one.

Only the trained rows are stored; the table stays shared. A token that has one is found by comparing its id.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .lora import embedding_scale
from .rows import PeftLayer, TwoStreamEmbedding, constant


class TwoStreamTokens(TwoStreamEmbedding):
    """token_ids: (K,) int64, the trained tokens; rows: (K, d), theirs. They stand in for the frozen rows and are not a
    change of them, which in a quantized file are rounded."""

    def __init__(self, base_layer: nn.Module, token_ids: Tensor, rows: Tensor) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.token_ids: Tensor
        self.register_buffer("token_ids", token_ids, persistent=False)
        self.adapter_rows = constant(rows)

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids: (B, S) -> (2 * B, S, d)."""
        frozen: Tensor = self.base_layer(input_ids)
        chosen = (input_ids[..., None] == self.token_ids).to(frozen.dtype)  # (B, S, K), at most one 1
        others = 1 - chosen.sum(-1, keepdim=True)
        return torch.cat([frozen, frozen * others + chosen @ self.adapter_rows])


def two_stream_tokens(name: str, layer: PeftLayer, frozen: nn.Module, adapter: str) -> nn.Module | None:
    """The two-stream form of PEFT's trainable tokens."""
    if adapter not in layer.token_indices:
        return None
    ids = torch.tensor(layer.token_indices[adapter])
    trained = layer.trainable_tokens_delta[adapter].detach()
    return TwoStreamTokens(frozen, ids, trained * embedding_scale(frozen))
