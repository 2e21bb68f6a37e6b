"""The gate: how the base stream's and the adapter stream's last hidden states become one.

Knows nothing about models, adapters or tokens. Each kind is one class; the exporter traces the same `forward`
that training runs, so there is one implementation of every rule.

Source: IMSM (arXiv 2412.17383), section "Query-aware gate"; the other kinds are the rules that the authors'
released code calls by numbers.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .checks import typed
from .choices import check_gate_kind
from .errors import SettingsError


class Memories(NamedTuple):
    """The last hidden states of both streams, after the model's final norm.

    base, adapter: (..., d), any floating dtype; query_base, query_adapter: broadcastable to them, the mean of the
    stream's states over the prompt's tokens.
    """

    base: Tensor
    adapter: Tensor
    query_base: Tensor
    query_adapter: Tensor


class Gated(NamedTuple):
    """fused: (..., d), the state that goes to the lm_head, in the dtype of the memories.
    gate: (..., d), float32, in [0, 1]; 1 means "only the base memory"."""

    fused: Tensor
    gate: Tensor


class Gate(nn.Module):
    """A fusion rule. Subclasses implement `forward`, which computes in float32 whatever the memories' dtype is."""

    kind: ClassVar[str]
    rank: int

    def forward(self, memories: Memories, memory_bias: Tensor | None = None) -> Gated:
        """Blend the memories.

        memory_bias: broadcastable to (..., d), added before the sigmoid; None is 0. Large and positive gives the
        base memory, large and negative the adapter's.
        """
        raise NotImplementedError


def blend(gate: Tensor, base: Tensor, adapter: Tensor) -> Tensor:
    """gate * base + (1 - gate) * adapter: exactly `base` where gate is 1 and exactly `adapter` where it is 0."""
    return gate * base + (1 - gate) * adapter


class _LearnedGate(Gate):
    """sigmoid(gate_up(gate_down(z))) over `blocks` concatenated d-vectors; no biases, dropout after each linear."""

    blocks: ClassVar[int]

    def __init__(self, hidden_size: int, rank: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        if rank < 1:
            raise SettingsError("gate_rank", rank, "it must be at least 1")
        self.rank = rank
        self.gate_down = nn.Linear(self.blocks * hidden_size, rank, bias=False, dtype=torch.float32)
        self.gate_up = nn.Linear(rank, hidden_size, bias=False, dtype=torch.float32)
        self.dropout = nn.Dropout(dropout)

    def _features(self, memories: Memories) -> Tensor:
        """z: (..., blocks * d), float32."""
        raise NotImplementedError

    def _gate(self, memories: Memories, memory_bias: Tensor | None) -> Tensor:
        z = self.dropout(self.gate_down(self._features(memories)))
        z = self.dropout(self.gate_up(z))
        return torch.sigmoid(z if memory_bias is None else z + memory_bias)

    def forward(self, memories: Memories, memory_bias: Tensor | None = None) -> Gated:
        gate = self._gate(memories, memory_bias)
        fused = blend(gate, memories.base.float(), memories.adapter.float())
        return Gated(fused.to(memories.base.dtype), gate)


class QueryAwareGate(_LearnedGate):
    """The paper's gate: z = concat(q_base, h_base, h_adapter, q_adapter)."""

    kind = "query_aware"
    blocks = 4

    def _features(self, memories: Memories) -> Tensor:
        base, adapter, query_base, query_adapter = (state.float() for state in memories)
        return torch.cat([query_base.expand_as(base), base, adapter, query_adapter.expand_as(base)], dim=-1)


class TokenGate(_LearnedGate):
    """Without the query: z = concat(h_base, h_adapter)."""

    kind = "token"
    blocks = 2

    def _features(self, memories: Memories) -> Tensor:
        return torch.cat([memories.base.float(), memories.adapter.float()], dim=-1)


class ResidualGate(TokenGate):
    """The token gate, then 0.5 * h_base + 0.5 * h: at least half of the base memory remains."""

    kind = "residual"

    def forward(self, memories: Memories, memory_bias: Tensor | None = None) -> Gated:
        fused, gate = super().forward(Memories(*(state.float() for state in memories)), memory_bias)
        return Gated((0.5 * memories.base.float() + 0.5 * fused).to(memories.base.dtype), gate)


class QueryMixedGate(TokenGate):
    """The token gate over states that are each mixed half and half with their stream's query mean."""

    kind = "query_mixed"

    def forward(self, memories: Memories, memory_bias: Tensor | None = None) -> Gated:
        base, adapter, query_base, query_adapter = (state.float() for state in memories)
        mixed = Memories(0.5 * base + 0.5 * query_base, 0.5 * adapter + 0.5 * query_adapter, query_base, query_adapter)
        fused, gate = super().forward(mixed, memory_bias)
        return Gated(fused.to(memories.base.dtype), gate)


class MeanLogitsGate(Gate):
    """No parameters: the mean of the two streams' logits, as the lm_head of the mean state (lm_head is linear)."""

    kind = "mean_logits"
    rank = 0

    def __init__(self, hidden_size: int, rank: int = 0, dropout: float = 0.0) -> None:
        super().__init__()

    def forward(self, memories: Memories, memory_bias: Tensor | None = None) -> Gated:
        zero = torch.zeros_like(memories.base, dtype=torch.float32)
        gate = torch.sigmoid(zero if memory_bias is None else zero + memory_bias)
        fused = blend(gate, memories.base.float(), memories.adapter.float())
        return Gated(fused.to(memories.base.dtype), gate)


GATES: dict[str, type[Gate]] = {
    gate.kind: gate for gate in (QueryAwareGate, TokenGate, ResidualGate, QueryMixedGate, MeanLogitsGate)
}


def make_gate(kind: str, hidden_size: int, rank: int = 8, dropout: float = 0.0) -> Gate:
    """A new gate of `kind` for d = hidden_size. Raises SettingsError for an unknown kind, a rank below 1, and arguments
    of another type."""
    check_gate_kind(typed("gate", kind, str))
    gate_class: type[Gate] = GATES[kind]
    return gate_class(
        typed("hidden_size", hidden_size, int), typed("gate_rank", rank, int), typed("gate_dropout", dropout, float)
    )
