"""BLOOM: its own attention, with ALiBi (arXiv 2108.12409) added to the scores."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.bloom import modeling_bloom

from ...replaced import replaced
from . import attention_function, register


@register("bloom")
def bloom(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Slopes come from the model's own function: what it adds at position 1."""
    heads = model.config.n_head
    slopes = modeling_bloom.build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1, None]  # (heads, 1)

    def alibi(positions: Tensor, last: Tensor) -> Tensor:
        return slopes * (positions - last)

    def forward(self: Any, hidden_states: Tensor, residual: Tensor, **arguments: Any) -> tuple[Tensor, None]:
        rows, sequence, width = hidden_states.shape
        packed = self.query_key_value(hidden_states).view(rows, sequence, heads, 3, self.head_dim)
        query, key, value = (packed[..., part, :].transpose(1, 2) for part in range(3))
        attend = attention_function(model)
        output, _ = attend(self, query, key, value, None, scaling=self.inv_norm_factor, key_bias=alibi)
        return self.dense(output.reshape(rows, sequence, width)) + residual, None

    return replaced(modeling_bloom.BloomAttention, "forward", forward)
