"""XGLM: its own attention, with the queries scaled before the heads are split."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.xglm import modeling_xglm

from ...replaced import replaced
from . import attention_function, register


@register("xglm")
def xglm(model: PreTrainedModel) -> AbstractContextManager[None]:
    """The same attention as elsewhere, through the interface."""

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **arguments: Any
    ) -> tuple[Tensor, None]:
        rows, sequence, width = hidden_states.shape
        query, key, value = (
            project(hidden_states).view(rows, sequence, self.num_heads, self.head_dim).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        output, _ = attention_function(model)(self, query, key, value, attention_mask, scaling=self.scaling)
        return self.out_proj(output.reshape(rows, sequence, width)), None

    return replaced(modeling_xglm.XGLMAttention, "forward", forward)
