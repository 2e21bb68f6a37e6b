"""The module that is traced: one step of both streams over new tokens, from embeddings to logits.

Rows of the two streams are stacked for every projection, so that each weight is read once per step; below the first
layer that the adapter changes there is one row for both. docs/ARTIFACT.md documents inputs and outputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from imsm_core.backbone import apply_head, last_hidden_state
from imsm_core.gates import Gate, Memories

from .adapters import ADAPTER_ROWS, TwoStreamEmbedding
from .attention.kv_scales import KVScales
from .attention.nodes import LayerCaches, Lengths, StepTensors, emitting
from .attention.plan import AttentionPlan
from .streams import StreamLayout, split_streams
from .trunk import stacking_after_trunk

BLEND, BASE, ADAPTER = MEMORIES = range(3)
"""What a position's logits are of: the gate's blend, or one memory alone."""


class StepInputs(NamedTuple):
    """One step's inputs, in the order in which the graph has them. S new tokens, N wanted positions, P cached tokens.

    input_ids, position_ids: (B, S) int64. seqlens_k: (B,) int32, tokens of the row after this step, minus one.
    total_sequence_length: () int32, the largest of them, plus one. query_seqlens: (B,) int32, how many of the S tokens
    are the row's. These count the text alone, no virtual tokens. logit_positions: (B, N) int64, into S. query_mask:
    (B, S) float32, 1 at the prompt's tokens. past_query_sum: (B, 2, d) float32, (base, adapter); past_query_count: (B,)
    float32. memory_bias: (B, N) float32. memory: (B, N) int64, one of MEMORIES. past: the caches, by layer and group.
    """

    input_ids: Tensor
    position_ids: Tensor
    seqlens_k: Tensor
    total_sequence_length: Tensor
    query_seqlens: Tensor
    logit_positions: Tensor
    query_mask: Tensor
    past_query_sum: Tensor
    past_query_count: Tensor
    memory_bias: Tensor
    memory: Tensor
    past: list[LayerCaches]


class TwoStreamStep(nn.Module):
    """Traced with two streams and a gate, or with the base stream alone (`gate` None). virtual_tokens: how many tokens
    stand before the text in the adapter stream, whose cache and positions they lengthen. kv_scales: of int8 caches."""

    def __init__(
        self,
        model: PreTrainedModel,
        gate: Gate | None,
        plan: AttentionPlan,
        layout: StreamLayout,
        virtual_tokens: int = 0,
        kv_scales: KVScales | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.gate = gate
        self.plan = plan
        self.layout = layout
        self.virtual_tokens = virtual_tokens
        self.rotary_cos: Tensor | None
        self.rotary_sin: Tensor | None
        for name, table in (("rotary_cos", plan.rotary.cos), ("rotary_sin", plan.rotary.sin)):
            self.register_buffer(name, None if table is None else table.to(model.dtype), persistent=False)
        self.kv_scales = kv_scales
        for part, scales in (("key", kv_scales.keys), ("value", kv_scales.values)) if kv_scales else ():
            for layer, scale in enumerate(scales):
                self.register_buffer(f"{part}_scale_{layer}", scale, persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """What the backbone computes in."""
        return self.model.dtype

    def forward(self, *flat: Any) -> dict[str, Any]:
        """The outputs by name; `present` is indexed like `past`."""
        inputs = StepInputs(*flat)
        layout, layers = self.layout, len(self.plan.layers)
        embedding = self.model.get_input_embeddings()
        hidden = embedding(inputs.input_ids)  # (B, S, d), or (2B, S, d) from a two-stream embedding
        position_ids = inputs.position_ids
        if layout.trunk == 0:
            hidden = hidden if isinstance(embedding, TwoStreamEmbedding) else layout.stack(hidden)
            ahead = [_plus(position_ids, extra) for extra in (0, self.virtual_tokens)]
            position_ids = torch.cat(ahead[: layout.streams]) if layout.streams > 1 else position_ids
        step = StepTensors(
            self.plan,
            layout,
            position_ids,
            self._lengths(inputs),
            self.rotary_cos,
            self.rotary_sin,
            inputs.past,
            self._scales(),
            self.dtype,
        )
        ones = torch.ones_like(inputs.query_mask)[..., None].to(self.dtype)  # (B, S, 1)
        mask = torch.cat([torch.zeros_like(ones)] * (layout.streams - 1) + [ones])
        with emitting(self.model, step), ADAPTER_ROWS.of(mask), stacking_after_trunk(self.model, layout, layers):
            hidden = last_hidden_state(self.model, inputs_embeds=hidden, position_ids=position_ids)
        states = split_streams(hidden, layout.streams)
        wanted = [_gather(state, inputs.logit_positions) for state in states]  # (B, N, d) each
        outputs: dict[str, Any] = {"hidden_base": wanted[0].float()}
        fused = wanted[0] if self.gate is None else self._fuse(inputs, states, wanted, outputs)
        outputs["logits"] = apply_head(self.model, fused.to(self.dtype)).float()
        outputs["present"] = step.present
        return outputs

    def _lengths(self, inputs: StepInputs) -> dict[str, Lengths]:
        """By group."""
        seqlens, total, query = inputs.seqlens_k, inputs.total_sequence_length, inputs.query_seqlens
        base = Lengths(seqlens, total, None if self.layout.portable else query)
        if self.layout.streams == 1:
            return {"base": base}
        longer, most = _plus(seqlens, self.virtual_tokens), _plus(total, self.virtual_tokens)
        return {
            "base": base,
            "shared": base,
            "adapter": Lengths(longer, most, base.query_seqlens),
            "both": Lengths(torch.cat([seqlens, longer]), most, torch.cat([query, query])),
        }

    def _scales(self) -> KVScales | None:
        if self.kv_scales is None:
            return None
        layers = range(len(self.plan.layers))
        keys, values = ([getattr(self, f"{part}_scale_{layer}") for layer in layers] for part in ("key", "value"))
        return KVScales(keys, values)

    def _fuse(self, inputs: StepInputs, states: list[Tensor], wanted: list[Tensor], outputs: dict[str, Any]) -> Tensor:
        assert self.gate is not None
        wanted = [state.float() for state in wanted]  # the gate computes in float32 whatever the backbone does
        query = inputs.query_mask[:, None]  # (B, 1, S)
        asked = inputs.query_mask[..., None] > 0  # what attention leaves at padding may be nan, and 0 * nan is nan
        sums = torch.cat([query @ torch.where(asked, state.float(), 0.0) for state in states], dim=1)  # (B, 2, d)
        query_sum = inputs.past_query_sum + sums
        query_count = inputs.past_query_count + inputs.query_mask.sum(-1)
        mean = query_sum / query_count[:, None, None]
        memories = Memories(wanted[0], wanted[1], mean[:, 0:1], mean[:, 1:2])
        gated = self.gate(memories, inputs.memory_bias[..., None])
        memory = inputs.memory[..., None]  # (B, N, 1)
        fused = torch.where(memory == ADAPTER, wanted[1], gated.fused)
        fused = torch.where(memory == BASE, wanted[0], fused)
        outputs["hidden_adapter"] = wanted[1]
        outputs["hidden_fused"] = fused
        outputs["gate"] = gated.gate
        outputs["gate_mean"] = gated.gate.mean(-1)
        outputs["present_query_sum"] = query_sum
        outputs["present_query_count"] = query_count
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
