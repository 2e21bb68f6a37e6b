"""GPT-J: its own attention, with an interleaved rotation of part of each head from a table in every layer."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.gptj import modeling_gptj

from ...replaced import replaced
from . import attention_function, register
from .sinusoidal import SinusoidalRotation


@register("gptj")
def gptj(model: PreTrainedModel) -> AbstractContextManager[None]:
    """All layers share the first one's table: they are equal."""
    rotation = SinusoidalRotation(model.base_model.get_buffer("h.0.attn.embed_positions"))

    def forward(self: Any, hidden_states: Tensor, position_ids: Tensor, **arguments: Any) -> tuple[Tensor, None]:
        rows, sequence, width = hidden_states.shape

        def heads(x: Tensor) -> Tensor:
            return x.view(rows, sequence, self.num_attention_heads, self.head_dim).transpose(1, 2)

        query, key = (rotation(heads(project(hidden_states)), position_ids) for project in (self.q_proj, self.k_proj))
        value = heads(self.v_proj(hidden_states))
        output, _ = attention_function(model)(self, query, key, value, None, scaling=1.0 / self.scale_attn)
        return self.out_proj(output.reshape(rows, sequence, width)), None

    return replaced(modeling_gptj.GPTJAttention, "forward", forward)
