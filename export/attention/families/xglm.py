"""XGLM: its own attention, with the queries scaled before the heads are split, and positions in float32 always."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.xglm import modeling_xglm

from ...replaced import replaced
from . import attention_function, register


@register("xglm")
@contextmanager
def xglm(model: PreTrainedModel) -> Iterator[None]:
    """The same attention as elsewhere, through the interface; positions of the type of the embeddings that they are
    added to."""
    positions = modeling_xglm.XGLMSinusoidalPositionalEmbedding
    embed = positions.forward

    def forward_positions(self: Any, *arguments: Any, **named: Any) -> Tensor:
        embedded: Tensor = embed(self, *arguments, **named)
        return embedded.to(model.dtype)

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

    with replaced(modeling_xglm.XGLMAttention, "forward", forward), replaced(positions, "forward", forward_positions):
        yield
