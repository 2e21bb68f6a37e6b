"""MPT: its own attention, with ALiBi (arXiv 2108.12409) added to the scores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.mpt import modeling_mpt

from ...replaced import replaced
from . import attention_function, register


@register("mpt")
@contextmanager
def mpt(model: PreTrainedModel) -> Iterator[None]:
    """Slopes come from the model's own function: what it subtracts for one position back. The model converts its mask
    to another type, so there must be one; the attention here does not use it."""
    heads = model.config.n_heads
    slopes: Tensor = -modeling_mpt.build_mpt_alibi_tensor(heads, 2)[:, 0, :1]  # (heads, 1)

    def alibi(positions: Tensor, last: Tensor) -> Tensor:
        return slopes * (positions - last)

    def forward(self: Any, hidden_states: Tensor, **arguments: Any) -> tuple[Tensor, None]:
        rows, sequence, width = hidden_states.shape
        packed: Tensor = self.Wqkv(hidden_states)
        if self.clip_qkv:
            packed = packed.clamp(-self.clip_qkv, self.clip_qkv)
        packed = packed.view(rows, sequence, 3, heads, self.head_dim)
        query, key, value = (packed[:, :, part].transpose(1, 2) for part in range(3))
        attend = attention_function(model)
        output, _ = attend(self, query, key, value, None, scaling=self.softmax_scale, key_bias=alibi)
        return self.out_proj(output.reshape(rows, sequence, width)), None

    def no_mask(*args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros(1)

    with (
        replaced(modeling_mpt, "create_causal_mask", no_mask),
        replaced(modeling_mpt.MptAttention, "forward", forward),
    ):
        yield
