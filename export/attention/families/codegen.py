"""CodeGen: its own attention, GPT-J's with queries, values and keys packed for four devices."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.codegen import modeling_codegen

from ...replaced import replaced
from . import attention_function, register
from .sinusoidal import SinusoidalRotation

# What the released weights were laid out for: each holds its heads' queries, values and keys, in this order.
_DEVICES = 4


@register("codegen")
def codegen(model: PreTrainedModel) -> AbstractContextManager[None]:
    """All layers share the first one's table: they are equal."""
    rotation = SinusoidalRotation(model.base_model.get_buffer("h.0.attn.embed_positions"))

    def forward(self: Any, hidden_states: Tensor, position_ids: Tensor, **arguments: Any) -> tuple[Tensor, None]:
        rows, sequence, width = hidden_states.shape
        packed = self.qkv_proj(hidden_states).view(rows, sequence, _DEVICES, 3, -1, self.head_dim)
        query, value, key = (packed[:, :, :, part].flatten(2, 3).transpose(1, 2) for part in range(3))
        query, key = rotation(query, position_ids), rotation(key, position_ids)
        output, _ = attention_function(model)(self, query, key, value, None, scaling=1.0 / self.scale_attn)
        return self.out_proj(output.reshape(rows, sequence, width)), None

    return replaced(modeling_codegen.CodeGenAttention, "forward", forward)
