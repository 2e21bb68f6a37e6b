"""Falcon: its own attention, with rotation or ALiBi (arXiv 2108.12409), and three layouts of heads."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.falcon import modeling_falcon

from ...replaced import replaced
from . import attention_function, register


@register("falcon")
def falcon(model: PreTrainedModel) -> AbstractContextManager[None]:
    """The three layouts are one: groups of query heads, each followed by its key head and its value head. Slopes come
    from the model's own function: what it adds at position 1."""
    config = model.config
    heads = config.num_attention_heads
    slopes = modeling_falcon.build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1, None]  # (heads, 1)

    def key_bias(positions: Tensor, last: Tensor) -> Tensor:
        # The model was trained with positions and products in bfloat16, which is not the same for every difference.
        scale = float((config.hidden_size // heads) ** -0.5)
        return _bfloat16(slopes * _bfloat16(positions)) * scale

    def forward(
        self: Any,
        hidden_states: Tensor,
        alibi: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **arguments: Any,
    ) -> tuple[Tensor, None]:
        rows, sequence, width = hidden_states.shape
        groups = self.num_kv_heads if self.new_decoder_architecture else (1 if self.multi_query else heads)
        packed = self.query_key_value(hidden_states).view(rows, sequence, groups, heads // groups + 2, self.head_dim)
        query = packed[..., :-2, :].flatten(2, 3).transpose(1, 2)
        key, value = packed[..., -2, :].transpose(1, 2), packed[..., -1, :].transpose(1, 2)
        if alibi is None and position_embeddings is not None:
            query, key = modeling_falcon.apply_rotary_pos_emb(query, key, *position_embeddings)
        attend = attention_function(model)
        bias = None if alibi is None else key_bias
        output, _ = attend(self, query, key, value, None, scaling=self.inv_norm_factor, key_bias=bias)
        return self.dense(output.reshape(rows, sequence, width)), None

    return replaced(modeling_falcon.FalconAttention, "forward", forward)


def _bfloat16(x: Tensor) -> Tensor:
    """Rounded to bfloat16 and kept in float32, in which the runtime can multiply."""
    return x.to(torch.bfloat16).float()
