"""The module that is traced: one step of both streams over new tokens, from embeddings to logits.

Rows of the two streams are stacked for every projection, so that each weight is read once per step, and split for
attention, so that each stream has a cache of its own. docs/ARTIFACT.md documents inputs and outputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from imsm_core.backbone import apply_head, last_hidden_state
from imsm_core.gates import Gate, Memories

from .adapters import ADAPTER_ROWS, TwoStreamEmbedding
from .attention import AttentionPlan, StepTensors, emitting
from .streams import split_streams

Cache = list[list[tuple[Tensor, Tensor]]]
"""[stream][layer] -> (key, value), each (B, kv_heads, length, head_size)."""


class StepInputs(NamedTuple):
    """One step's inputs, in the order in which the graph has them. S new tokens, N wanted positions, P cached tokens.

    input_ids, position_ids: (B, S) int64. seqlens_k: (B,) int32, tokens of the row after this step, minus one.
    total_sequence_length: () int32, the largest of them, plus one. These count the text alone, no virtual tokens.
    logit_positions: (B, N) int64, into S. query_mask: (B, S) float32, 1 at the prompt's tokens. past_query_sum:
    (B, 2, d) float32, (base, adapter); past_query_count: (B,) float32. memory_bias: (B,) float32. past: the caches.
    """

    input_ids: Tensor
    position_ids: Tensor
    seqlens_k: Tensor
    total_sequence_length: Tensor
    logit_positions: Tensor
    query_mask: Tensor
    past_query_sum: Tensor
    past_query_count: Tensor
    memory_bias: Tensor
    past: Cache


class TwoStreamStep(nn.Module):
    """Traced with two streams and a gate, or with the base stream alone (`gate` None). virtual_tokens: how many tokens
    stand before the text in the adapter stream, whose cache and positions they lengthen."""

    def __init__(self, model: PreTrainedModel, gate: Gate | None, plan: AttentionPlan, virtual_tokens: int = 0) -> None:
        super().__init__()
        self.model = model
        self.gate = gate
        self.plan = plan
        self.streams = 1 if gate is None else 2
        self.virtual_tokens = (0,) if gate is None else (0, virtual_tokens)
        self.rotary_cos: Tensor | None
        self.rotary_sin: Tensor | None
        self.register_buffer("rotary_cos", plan.rotary.cos, persistent=False)
        self.register_buffer("rotary_sin", plan.rotary.sin, persistent=False)

    def forward(self, *flat: Any) -> dict[str, Any]:
        """The outputs by name; `present` is a Cache."""
        inputs = StepInputs(*flat)
        embedding = self.model.get_input_embeddings()
        stacked = embedding(inputs.input_ids)  # (streams * B, S, d)
        if not isinstance(embedding, TwoStreamEmbedding):
            stacked = torch.cat([stacked] * self.streams)
        position_ids = torch.cat([_plus(inputs.position_ids, extra) for extra in self.virtual_tokens])
        step = StepTensors(
            self.plan,
            self.streams,
            position_ids,
            [_plus(inputs.seqlens_k, extra) for extra in self.virtual_tokens],
            [_plus(inputs.total_sequence_length, extra) for extra in self.virtual_tokens],
            self.rotary_cos,
            self.rotary_sin,
            inputs.past,
        )
        ones = torch.ones_like(inputs.query_mask)[..., None]  # (B, S, 1)
        mask = torch.cat([torch.zeros_like(ones)] * (self.streams - 1) + [ones])
        with emitting(self.model, step), ADAPTER_ROWS.of(mask):
            hidden = last_hidden_state(self.model, inputs_embeds=stacked, position_ids=position_ids)
        states = split_streams(hidden, self.streams)
        wanted = [_gather(state, inputs.logit_positions) for state in states]  # (B, N, d) each
        outputs: dict[str, Any] = {"hidden_base": wanted[0]}
        fused = wanted[0] if self.gate is None else self._fuse(inputs, states, wanted, outputs)
        outputs["logits"] = apply_head(self.model, fused)
        outputs["present"] = step.present
        return outputs

    def _fuse(self, inputs: StepInputs, states: list[Tensor], wanted: list[Tensor], outputs: dict[str, Any]) -> Tensor:
        assert self.gate is not None
        query = inputs.query_mask[:, None]  # (B, 1, S)
        sums = torch.cat([query @ state.float() for state in states], dim=1)  # (B, 2, d)
        query_sum = inputs.past_query_sum + sums
        query_count = inputs.past_query_count + inputs.query_mask.sum(-1)
        mean = query_sum / query_count[:, None, None]
        memories = Memories(wanted[0], wanted[1], mean[:, 0:1], mean[:, 1:2])
        gated = self.gate(memories, inputs.memory_bias[:, None, None])
        outputs["hidden_adapter"] = wanted[1]
        outputs["gate"] = gated.gate
        outputs["gate_mean"] = gated.gate.mean(-1)
        outputs["present_query_sum"] = query_sum
        outputs["present_query_count"] = query_count
        fused: Tensor = gated.fused
        return fused


def _plus(tensor: Tensor, extra: int) -> Tensor:
    return tensor + extra if extra else tensor


def _gather(states: Tensor, positions: Tensor) -> Tensor:
    """states: (B, S, d), positions: (B, N) -> (B, N, d), as one GatherND node."""
    return torch.onnx.ops.symbolic(
        "GatherND",
        [states, positions[..., None]],
        {"batch_dims": 1},
        dtype=states.dtype,
        shape=(*positions.shape, states.shape[-1]),
    )
