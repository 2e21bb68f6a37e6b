"""GPT-Neo: its own attention, unscaled, every other layer with a window that it keeps as a table in the layer."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.gpt_neo import modeling_gpt_neo

from ...replaced import replaced
from . import attention_function, register


@register("gpt_neo")
def gpt_neo(model: PreTrainedModel) -> AbstractContextManager[None]:
    """The table of a local layer allows the last `window_size` tokens."""

    def forward(self: Any, hidden_states: Tensor, **arguments: Any) -> tuple[Tensor, None]:
        rows, sequence, width = hidden_states.shape
        query, key, value = (
            project(hidden_states).view(rows, sequence, self.num_heads, self.head_dim).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        window = model.config.window_size if self.attention_type == "local" else None
        attend = attention_function(model)
        settings = {"scaling": 1.0, "sliding_window": window, "layer_idx": self.layer_id}
        output, _ = attend(self, query, key, value, None, **settings)
        return self.out_proj(output.reshape(rows, sequence, width)), None

    return replaced(modeling_gpt_neo.GPTNeoSelfAttention, "forward", forward)
