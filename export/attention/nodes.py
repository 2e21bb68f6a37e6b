"""Attention of every layer as GroupQueryAttention nodes: one for both streams' rows, or one per stream.

The emitter is what the trace runs in place of attention. GroupQueryAttention:
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from ..experts import emitting_experts
from ..operands import trimmed
from ..streams import StreamLayout, split_streams
from .kv_scales import KVScales
from .plan import AttentionPlan, KeyBias, LayerAttention, attention_by, layer_index
from .rotary import fixed_rotary, replaced_rotary, rotary_node

LayerCaches = list[tuple[Tensor, Tensor]]
"""One layer's (key, value) by group, each (rows of the group, kv_heads, length, cached_head_size)."""


class Lengths(NamedTuple):
    """seqlens_k: (rows,) int32, tokens of the row after this step, minus one. total: () int32, the largest of them plus
    one, or more. query_seqlens: (rows,) int32, how many of the step's tokens are the row's; None in the portable form,
    which old versions of the operator take."""

    seqlens_k: Tensor
    total: Tensor
    query_seqlens: Tensor | None


@dataclass
class StepTensors:
    """What one traced step gives the attention of every layer and collects from it.

    past and present are indexed [layer][group of `layout.groups(layer)`]. position_ids: like the rows of the first
    layer's input. lengths: by group, virtual tokens counted in. cos, sin: the rotary tables, if the plan has them.
    scales: of quantized caches. dtype: what the backbone computes in. attention_biases: (1, heads, S, total) by group,
    computed by the first layer that has a key bias, for all of them.
    """

    plan: AttentionPlan
    layout: StreamLayout
    position_ids: Tensor
    lengths: dict[str, Lengths]
    cos: Tensor | None
    sin: Tensor | None
    past: list[LayerCaches]
    scales: KVScales | None = None
    dtype: torch.dtype = torch.float32
    present: list[LayerCaches] = field(default_factory=list)
    attention_biases: dict[str, Tensor] = field(default_factory=dict)


_step: StepTensors | None = None


@contextmanager
def emitting(model: PreTrainedModel, step: StepTensors) -> Iterator[None]:
    """Inside the block the backbone's attention emits nodes for `step` and fills `step.present`."""
    global _step
    step.present = [[] for _ in step.plan.layers]
    _step = step
    try:
        with (
            attention_by(model, "imsm_emit"),
            emitting_experts(model, step.plan.experts),
            replaced_rotary(model, _EMITTED_ROTARY.get(step.plan.rotary.mode)),
            fixed_rotary(step.plan.rotary),
        ):
            yield
    finally:
        _step = None


def _emit(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **arguments: Any
) -> tuple[Tensor, None]:
    """The emitter. query: (rows, heads, S, D), the streams' rows stacked. Returns (rows, S, heads, value_size)."""
    assert _step is not None
    index = layer_index(module, arguments)
    layer, groups = _step.plan.layers[index], _step.layout.groups(index)
    split = [split_streams(_heads_last(x, layer.cached_head_size), len(groups)) for x in (query, key, value)]
    outputs = []
    for place, (group, *qkv) in enumerate(zip(groups, *split, strict=True)):
        bias = _attention_bias(arguments.get("key_bias"), _step, index, group, query.shape[2])
        past = _step.past[index][place]
        output, present = _group_query_attention(layer, _step, index, group, qkv, past, bias, arguments.get("s_aux"))
        _step.present[index].append(present)
        outputs.append(output)
    stacked = torch.cat(outputs, dim=0) if len(outputs) > 1 else outputs[0]
    rows, _, sequence, _ = query.shape
    return stacked.view(rows, sequence, layer.heads, layer.cached_head_size)[..., : layer.value_size], None


def _attention_bias(
    key_bias: KeyBias | None, step: StepTensors, index: int, group: str, sequence: int
) -> Tensor | None:
    """(1, heads, S, total): the kernel wants `total` columns, not as many as a longer cache has."""
    if key_bias is None:
        return None
    if group not in step.attention_biases:
        total = step.lengths[group].total
        zero, one = torch.zeros_like(total), torch.ones_like(total)
        # The size of the result is the value of `total`, which no shape in the trace has; only broadcasting follows.
        length = step.past[index][0][0].shape[2] + sequence
        positions = torch.onnx.ops.symbolic("Range", [zero, total, one], dtype=total.dtype, shape=(length,)).float()
        bias = key_bias(positions, positions.amax(0))  # not of `total`, which CUDA's provider has on the host
        bias = bias[None, :, None, :] + torch.zeros(sequence)[None, None, :, None]
        step.attention_biases[group] = bias.to(step.dtype)
    return step.attention_biases[group]


def _group_query_attention(
    layer: LayerAttention,
    step: StepTensors,
    index: int,
    group: str,
    qkv: list[Tensor],
    past: tuple[Tensor, Tensor],
    attention_bias: Tensor | None,
    sink: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """qkv: query (rows, S, heads * D), key and value (rows, S, kv_heads * D). Returns the output like query, and
    present."""
    query, past_key, lengths = qkv[0], past[0], step.lengths[group]
    attributes: dict[str, Any] = {"num_heads": layer.heads, "kv_num_heads": layer.kv_heads, "scale": layer.scale}
    fused = layer.rotated and step.plan.rotary.mode == "fused"
    if fused:
        attributes |= {"do_rotary": 1, "rotary_interleaved": int(step.plan.rotary.interleaved)}
    if layer.sliding_window is not None:
        attributes["local_window_size"] = layer.sliding_window
    if layer.softcap is not None:
        attributes["softcap"] = layer.softcap
    scales: list[Tensor | None] = [None, None]
    if step.scales is not None:
        attributes |= step.scales.attributes
        scales = list(step.scales.of(index))
    inputs: list[Tensor | None] = [*qkv, *past, lengths.seqlens_k, lengths.total]
    inputs += [step.cos, step.sin] if fused else [None, None]
    # position_ids: the kernel counts them from the lengths; norms of queries and keys: only CUDA's kernel has them
    inputs += [None, attention_bias, sink, *scales, None, None, lengths.query_seqlens]
    rows, _, cached, size = past_key.shape
    cache = (rows, layer.kv_heads, cached + query.shape[1], size)
    output, present_key, present_value = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        trimmed(inputs),
        attributes,
        dtypes=[query.dtype, past_key.dtype, past_key.dtype],
        shapes=[query.shape, cache, cache],
        version=1,
    )
    return output, (present_key, present_value)


def _heads_last(x: Tensor, size: int) -> Tensor:
    """(rows, heads, S, D) -> (rows, S, heads * size), each head padded with zeros from D to size."""
    rows, heads, sequence, head_size = x.shape
    x = x.transpose(1, 2)
    if size != head_size:
        x = functional.pad(x, (0, size - head_size))
    return x.reshape(rows, sequence, heads * size)


def _pass_through(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """GroupQueryAttention rotates by itself."""
    return query, key


def _rotary_nodes(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    assert _step is not None
    assert _step.cos is not None
    assert _step.sin is not None
    positions = _step.layout.stack_to(_step.position_ids, query.shape[0])
    tables = (positions, _step.cos, _step.sin, _step.plan.rotary.interleaved)
    return rotary_node(query, *tables), rotary_node(key, *tables)


_EMITTED_ROTARY: dict[str, Any] = {"fused": _pass_through, "node": _rotary_nodes}


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """GroupQueryAttention is causal by itself and masks by its lengths."""


AttentionInterface.register("imsm_emit", _emit)
ALL_MASK_ATTENTION_FUNCTIONS.register("imsm_emit", _no_mask)
